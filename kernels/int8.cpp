// Entries to int8 products: packing weights, quantising, and one linear layer; see kernels/int8.py and int8.h.

#include <vector>

#include "int8_tiles.h"

using namespace tandem;

namespace {

// float32 to float16, round to nearest even; too large becomes infinity.
uint16_t float_to_half(float value) {
#if defined(__F16C__)
    return (uint16_t)_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    const float magnitude = std::fabs(value);
    if (!(magnitude < 65520.0f)) return sign | (magnitude == magnitude ? 0x7C00u : 0x7E00u);
    if (magnitude < 6.103515625e-5f) return sign | (uint16_t)std::nearbyint(magnitude * 16777216.0f);  // subnormal: in units of 2^-24
    bits &= 0x7FFFFFFFu;
    return sign | (uint16_t)((bits + 0xFFFu + (bits >> 13 & 1u) - (112u << 23)) >> 13);
#endif
}

// One column (a row of the weight) into its panel; the panels are zeroed before.
void pack_column(const uint8_t* codes, const float* scales, const float* minima, uint8_t* packed, int64_t column, int64_t k, int bits) {
    const int64_t groups = (k + GROUP - 1) / GROUP, pairs = padded(k) / PAIR, j = column % COLUMNS, v = j / 16, lane = j % 16;
    uint8_t* panel = packed + column / COLUMNS * pairs * pair_bytes(bits);
    for (int64_t g = 0; g < groups; ++g) {
        uint8_t* pair = panel + g / 2 * pair_bytes(bits);
        uint8_t* block = pair + g % 2 * (codes_bytes(bits) + 2 * COLUMNS);
        for (int i = 0; i < GROUP; ++i) {
            const uint8_t code = g * GROUP + i < k ? codes[g * GROUP + i] : (uint8_t)zero_of(bits);
            uint8_t* byte = block + (bits == 4 ? i / 8 : i / 4) * 128 + v * 64 + lane * 4 + i % 4;
            *byte = bits == 4 && i % 8 >= 4 ? (uint8_t)(*byte | code << 4) : (uint8_t)(bits == 4 ? *byte | code : code);
        }
        const uint16_t scale = float_to_half(scales[g]);
        std::memcpy(block + codes_bytes(bits) + 2 * j, &scale, 2);
        if (bits != 4) continue;
        const uint16_t minimum = float_to_bf16(minima ? minima[g] : 0.0f);
        std::memcpy(pair + pair_bytes(4) - 4 * COLUMNS + 4 * j + g % 2 * 2, &minimum, 2);
    }
}

#if TANDEM_TILES
// Rows [begin, end) of codes as output columns of panels that tiles multiply.
void pack_tiles(const uint8_t* codes, const float* scales, const float* minima, uint8_t* packed, const int64_t* columns, int64_t begin, int64_t end,
                int64_t k, int bits) {
    const int64_t groups = (k + GROUP - 1) / GROUP;
    std::vector<float> weight((size_t)k);
    for (int64_t r = begin; r < end; ++r) {
        for (int64_t i = 0; i < k; ++i) {
            const int64_t g = r * groups + i / GROUP;
            weight[(size_t)i] = scales[g] * (float)(codes[r * k + i] - zero_of(bits)) + (minima ? minima[g] : 0.0f);
        }
        pack_tile_column(weight.data(), k, packed + columns[r] / COLUMNS * tile_panel_bytes(k), columns[r] % COLUMNS);
    }
}
#endif

}  // namespace

// What this build's bits depend on: width and fusing of vectors, then what compute int8 takes beside them.
#if defined(__AVX512F__)
#define TANDEM_VECTORS "avx512"
#elif defined(__AVX__) && defined(__FMA__)
#define TANDEM_VECTORS "avx2"
#elif defined(__AVX__)
#define TANDEM_VECTORS "avx-nofma"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define TANDEM_VECTORS "aarch64"
#else
#define TANDEM_VECTORS "generic"
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define TANDEM_VNNI " avx512_vnni"
#else
#define TANDEM_VNNI ""
#endif
#if defined(__AVX512BW__) && defined(__AVX512BF16__)
#define TANDEM_BF16 " avx512_bf16"
#else
#define TANDEM_BF16 ""
#endif

extern "C" {

// Whether AMX tiles multiply; tests may say that they shall not. Packed weights belong to the answer at that time.
int32_t tandem_tiles() { return Tiles::used(); }
void tandem_want_tiles(int32_t tiles) { Tiles::want(tiles != 0); }

const char* tandem_built_for() { return TANDEM_VECTORS TANDEM_VNNI TANDEM_BF16; }

int64_t tandem_int8_packed_bytes(int64_t n, int64_t k, int32_t bits) {
#if TANDEM_TILES
    if (Tiles::used()) return (n + COLUMNS - 1) / COLUMNS * tile_panel_bytes(k);
#endif
    return (n + COLUMNS - 1) / COLUMNS * (padded(k) / PAIR) * pair_bytes(bits);
}

// Put rows of codes [rows][k], scales [rows][groups] and minima (or null) at the output columns `columns` of the zeroed `packed`.
void tandem_int8_pack(const uint8_t* codes, const float* scales, const float* minima, uint8_t* packed, const int64_t* columns, int64_t rows,
                      int64_t k, int32_t bits, int32_t threads) {
    const int64_t groups = (k + GROUP - 1) / GROUP;
    parallel_static(threads, rows, [&](int64_t begin, int64_t end) {
#if TANDEM_TILES
        if (Tiles::used()) {
            pack_tiles(codes, scales, minima, packed, columns, begin, end, k, bits);
            return;
        }
#endif
        for (int64_t r = begin; r < end; ++r)
            pack_column(codes + r * k, scales + r * groups, minima ? minima + r * groups : nullptr, packed, columns[r], k, bits);
    });
}

// Weight rows [rows][k] to 8-bit codes (zero 128) and scales that float16 holds. A group with a NaN or an infinity gets such a scale.
void tandem_int8_quantise_weight(const float* weight, uint8_t* codes, float* scales, int64_t rows, int64_t k, int32_t threads) {
    const int64_t groups = (k + GROUP - 1) / GROUP;
    parallel_static(threads, rows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            for (int64_t g = 0; g < groups; ++g) {
                const float* w = weight + r * k + g * GROUP;
                const int64_t count = k - g * GROUP < GROUP ? k - g * GROUP : GROUP;
                float most = 0.0f;
                for (int64_t i = 0; i < count; ++i) most = std::fabs(w[i]) > most || w[i] != w[i] ? std::fabs(w[i]) : most;
                const float scale = half_to_float(float_to_half(most / 127.0f)), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
                scales[r * groups + g] = scale;
                for (int64_t i = 0; i < count; ++i) {
                    const float code = std::nearbyint(w[i] * inverse), bounded = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
                    codes[r * k + g * GROUP + i] = (uint8_t)(bounded == bounded ? 128.0f + bounded : 128.0f);
                }
            }
    });
}

// out[m][n] = x[m][k] . matrix + bias. `work` holds the quantised rows, tandem_int8_work_bytes(m, k) of them; twice that when `fine`.
int64_t tandem_int8_work_bytes(int64_t m, int64_t k) { return held_rows(m) * (padded(k) * 2 + padded(k) / GROUP * 12) + 256; }

void tandem_int8_linear(const float* x, const Matrix* matrix, float* out, void* work, int64_t m, int32_t asked_fine, int32_t threads) {
    const int64_t width = padded(matrix->k), groups = width / GROUP, tiles = int8_tiles(m), whole = tiles * INT8_ROWS;
    const bool fine = asked_fine && !Tiles::used();
    const auto rows_at = [&](int64_t half) {
        char* at = (char*)work + half * tandem_int8_work_bytes(m, matrix->k);
        float* scales = (float*)at;
        if (Tiles::used()) {
            int8_t* codes = (int8_t*)(scales + held_rows(m));
            return Rows{codes, scales, nullptr, nullptr, width, codes + held_rows(m) * width};
        }
        int32_t* minus8 = (int32_t*)(scales + whole * groups);
        uint16_t* sums = (uint16_t*)(minus8 + whole * groups);
        return Rows{(int8_t*)(sums + 2 * whole * groups), scales, minus8, sums, width, nullptr};
    };
    const Rows rows = rows_at(0), rest = fine ? rows_at(1) : rows;
    for (int64_t r = 0; r < m; ++r) {
        quantise(x + r * matrix->k, matrix->k, rows, r);
        if (!fine) continue;
        for (int64_t g = 0; g < groups; ++g) {
            alignas(64) float part[GROUP] = {};
            const int64_t left = matrix->k - g * GROUP, count = left < 0 ? 0 : left < GROUP ? left : GROUP;
            std::memcpy(part, x + r * matrix->k + g * GROUP, (size_t)count * 4);
            quantise_rest(part, rows, rest, r, g);
        }
    }
    const int64_t panels = (matrix->n + COLUMNS - 1) / COLUMNS;
    parallel_static(threads, panels, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel)
            int8_product(*matrix, panel, panel + 1, rows, fine ? &rest : nullptr, m, 0, tiles, [&](int64_t row, int64_t count, int64_t p, const float* c) {
                for (int64_t r = 0; r < count; ++r)
                    for (int64_t j = 0; j < COLUMNS && p * COLUMNS + j < matrix->n; ++j) {
                        const int64_t column = p * COLUMNS + j;
                        out[(row + r) * matrix->n + column] = matrix->bias ? c[r * COLUMNS + j] + matrix->bias[column] : c[r * COLUMNS + j];
                    }
            });
    });
}

// Columns `ids` of the matrix, dequantised: out[count][k].
void tandem_int8_columns(const Matrix* matrix, const int64_t* ids, float* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) weight_row(*matrix, ids[i], out + i * matrix->k);
}
}
