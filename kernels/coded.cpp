// Matrix products of float32 rows with weights that stay as codes; see kernels/coded.py for what a code means.
//
// Panels of 64 output columns, [ceil(N/64)][K][8 * bits bytes]: a panel's row holds its 64 codes in planes. 8 bits: one byte a column.
// 4 bits: byte j holds columns j and 32 + j. 2 bits: byte j holds columns j, 16 + j, 32 + j, 48 + j. 3 bits: the two low bits as with 2,
// then 8 bytes whose byte j holds the highest bit of columns j, 8 + j, ... Scales are [panel][group][64], zeros likewise.
//
// A block of k of a panel is expanded to float32 in L1 and multiplied by the tiles of linear.cpp: every output element is one chain of
// fmas in the order of k, from +0, so its bits are those of the same weight expanded in memory.

#include "tile.h"

using namespace tandem;

namespace {

constexpr int PANEL = 64;
constexpr int K_BLOCK = 64;    // a block of a panel is 16 KB as float32
constexpr int ROW_BLOCK = 96;  // rows of one task

enum ScaleType { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// As kernels/coded.py's CodedArgs.
struct Coded {
    const uint8_t* codes;
    const void* scales;
    const uint8_t* zeros;    // null: the middle of the codes, or 0 where there are minima
    const void* minima;      // added after scaling, of the scales' type; may be null
    const float* table;      // what each of 16 codes stands for before scaling; null: the code less its zero
    const int32_t* order;    // which group each k belongs to; null: k / group
    const float* bias;
    int64_t n, k, groups, group;
    int32_t bits, scale_type;  // bits 0: FP8 (e4m3)
};

inline int64_t row_bytes(int bits) { return 8 * (bits == 0 ? 8 : bits); }

template <int BITS>
inline void unpack(const uint8_t* row, uint8_t* codes) {
    if (BITS == 8 || BITS == 0) {
        std::memcpy(codes, row, PANEL);
    } else if (BITS == 4) {
        for (int j = 0; j < 32; ++j) codes[j] = row[j] & 15, codes[32 + j] = row[j] >> 4;
    } else {
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 16; ++j) codes[16 * i + j] = row[j] >> (2 * i) & 3;
        if (BITS == 3)
            for (int i = 0; i < 8; ++i)
                for (int j = 0; j < 8; ++j) codes[8 * i + j] |= (row[16 + j] >> i & 1) << 2;
    }
}

template <int BITS>
inline void put(uint8_t* row, int64_t j, uint8_t code) {
    if (BITS == 8 || BITS == 0) {
        row[j] = code;
    } else if (BITS == 4) {
        row[j % 32] |= (uint8_t)((code & 15) << (j / 32 * 4));
    } else {
        row[j % 16] |= (uint8_t)((code & 3) << (j / 16 * 2));
        if (BITS == 3) row[16 + j % 8] |= (uint8_t)((code >> 2 & 1) << (j / 8));
    }
}

// e4m3: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, 0x7F and 0xFF are NaN. Exact, subnormals too.
inline void fp8_values(const uint8_t* codes, float* out) {
    uint32_t bits[PANEL];
    for (int j = 0; j < PANEL; ++j) bits[j] = (uint32_t)(codes[j] & 0x7F) << 20 | (uint32_t)(codes[j] & 0x80) << 24;
    std::memcpy(out, bits, sizeof bits);
    for (int j = 0; j < PANEL; ++j) out[j] = (codes[j] & 0x7F) == 0x7F ? NAN : out[j] * 0x1p120f;
}

// What one group of a panel is scaled by.
struct Group {
    alignas(64) float scale[PANEL];
    alignas(64) float zero[PANEL];
    alignas(64) float minimum[PANEL];
};

inline void widen_halves(const uint16_t* halves, float* out) {
#if defined(__AVX512F__)
    for (int j = 0; j < PANEL; j += 16)
        _mm512_storeu_ps(out + j, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(halves + j))));
#else
    for (int j = 0; j < PANEL; ++j) out[j] = half_to_float(halves[j]);
#endif
}

void widen(const void* numbers, int type, int64_t at, float* out) {
    if (type == FLOAT32)
        std::memcpy(out, (const float*)numbers + at, PANEL * sizeof(float));
    else if (type == BFLOAT16)
        for (int j = 0; j < PANEL; ++j) out[j] = bf16_to_float(((const uint16_t*)numbers)[at + j]);
    else
        widen_halves((const uint16_t*)numbers + at, out);
}

template <int BITS>
void read_group(const Coded& w, int64_t panel, int64_t g, Group& out) {
    const int64_t at = (panel * w.groups + g) * PANEL;
    const float middle = w.minima ? 0.0f : (float)(1 << BITS >> 1);
    widen(w.scales, w.scale_type, at, out.scale);
    if (w.minima) widen(w.minima, w.scale_type, at, out.minimum);
    for (int j = 0; j < PANEL; ++j) out.zero[j] = w.zeros ? (float)w.zeros[at + j] : middle;
}

// Codes of one k as float32.
template <int BITS>
inline void values(const Coded& w, const uint8_t* codes, const Group& group, float* out) {
    if (BITS == 0) {
        fp8_values(codes, out);
        for (int j = 0; j < PANEL; ++j) out[j] = out[j] * group.scale[j];
    } else if (BITS == 4 && w.table) {
        for (int j = 0; j < PANEL; ++j) out[j] = w.table[codes[j]] * group.scale[j];
    } else {
        for (int j = 0; j < PANEL; ++j) out[j] = ((float)codes[j] - group.zero[j]) * group.scale[j];
    }
    if (w.minima)
        for (int j = 0; j < PANEL; ++j) out[j] = out[j] + group.minimum[j];
}

// The group of one k after the other, read when it changes.
struct Groups {
    Group group;
    int64_t current = -1, end = 0;

    template <int BITS>
    inline void at(const Coded& w, int64_t panel, int64_t k) {
        if (w.order ? w.order[k] == current : k < end) return;
        current = w.order ? w.order[k] : k / w.group;
        end = (current + 1) * w.group;
        read_group<BITS>(w, panel, current, group);
    }
};

// Rows [k0, k0 + kn) of a panel as float32 [kn][64].
template <int BITS>
void expand(const Coded& w, int64_t panel, int64_t k0, int64_t kn, float* block) {
    Groups groups;
    alignas(64) uint8_t codes[PANEL];
    for (int64_t i = 0; i < kn; ++i) {
        const int64_t k = k0 + i;
        groups.at<BITS>(w, panel, k);
        float* out = block + i * PANEL;
        unpack<BITS>(w.codes + (panel * w.k + k) * row_bytes(BITS), codes);
        values<BITS>(w, codes, groups.group, out);
    }
}

// Output columns of one panel for `rows` rows from `row` on.
template <int BITS>
void panel_task(const Coded& w, const float* x, float* out, int64_t out_stride, int64_t panel, int64_t row, int64_t rows) {
    alignas(64) float block[K_BLOCK * PANEL];
    alignas(64) float scratch[ROW_BLOCK * PANEL];
    for (int64_t k0 = 0; k0 < w.k; k0 += K_BLOCK) {
        const int64_t kn = w.k - k0 < K_BLOCK ? w.k - k0 : K_BLOCK;
        expand<BITS>(w, panel, k0, kn, block);
        for (int64_t r = 0; r < rows; r += MAX_ROWS) {
            const int64_t rn = rows - r < MAX_ROWS ? rows - r : MAX_ROWS;
            for (int64_t j = 0; j < PANEL; j += TILE)
                tile_rows<FloatWeights, TILE_VECTORS, 0>(rn, x + (row + r) * w.k + k0, w.k, block + j, PANEL, kn, scratch + r * PANEL + j, PANEL,
                                                         k0 == 0);
        }
    }
    const int64_t column = panel * PANEL, columns = w.n - column < PANEL ? w.n - column : PANEL;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < columns; ++j) {
            const float sum = scratch[r * PANEL + j];
            out[(row + r) * out_stride + column + j] = w.bias ? sum + w.bias[column + j] : sum;
        }
}

template <int BITS>
void product(const Coded& w, const float* x, float* out, int64_t m, int64_t out_stride, int threads) {
    const int64_t panels = (w.n + PANEL - 1) / PANEL, blocks = (m + ROW_BLOCK - 1) / ROW_BLOCK;
    parallel_dynamic(threads, panels * blocks, [&](int64_t task) {
        const int64_t i = task % blocks, row = m * i / blocks;
        panel_task<BITS>(w, x, out, out_stride, task / blocks, row, m * (i + 1) / blocks - row);
    });
}

template <int BITS>
void pack(const uint8_t* codes, uint8_t* packed, int64_t n, int64_t k, int threads) {
    parallel_static(threads, (n + PANEL - 1) / PANEL, [&](int64_t begin, int64_t end) {
        for (int64_t column = begin * PANEL; column < end * PANEL && column < n; ++column)
            for (int64_t i = 0; i < k; ++i)
                put<BITS>(packed + (column / PANEL * k + i) * row_bytes(BITS), column % PANEL, codes[column * k + i]);
    });
}

// Columns `ids` of the weight, as rows of `out` [count][k].
template <int BITS>
void columns(const Coded& w, const int64_t* ids, float* out, int64_t count) {
    alignas(64) uint8_t codes[PANEL];
    alignas(64) float row[PANEL];
    for (int64_t i = 0; i < count; ++i) {
        const int64_t panel = ids[i] / PANEL;
        Groups groups;
        for (int64_t k = 0; k < w.k; ++k) {
            groups.at<BITS>(w, panel, k);
            unpack<BITS>(w.codes + (panel * w.k + k) * row_bytes(BITS), codes);
            values<BITS>(w, codes, groups.group, row);
            out[i * w.k + k] = row[ids[i] % PANEL];
        }
    }
}

}  // namespace

extern "C" {

int64_t tandem_coded_bytes(int64_t n, int64_t k, int32_t bits) { return (n + PANEL - 1) / PANEL * k * row_bytes(bits); }

// Put codes [n][k], one byte each, into the zeroed `packed`.
void tandem_coded_pack(const uint8_t* codes, uint8_t* packed, int64_t n, int64_t k, int32_t bits, int32_t threads) {
    if (bits == 2) return pack<2>(codes, packed, n, k, threads);
    if (bits == 3) return pack<3>(codes, packed, n, k, threads);
    if (bits == 4) return pack<4>(codes, packed, n, k, threads);
    pack<8>(codes, packed, n, k, threads);
}

// out[m] (rows `out_stride` apart) = x[m][k] . w + w.bias.
void tandem_coded_linear(const float* x, const Coded* w, float* out, int64_t m, int64_t out_stride, int32_t threads) {
    if (w->bits == 0) return product<0>(*w, x, out, m, out_stride, threads);
    if (w->bits == 2) return product<2>(*w, x, out, m, out_stride, threads);
    if (w->bits == 3) return product<3>(*w, x, out, m, out_stride, threads);
    if (w->bits == 4) return product<4>(*w, x, out, m, out_stride, threads);
    product<8>(*w, x, out, m, out_stride, threads);
}

// Output columns `ids` as they are multiplied, float32 [count][k].
void tandem_coded_columns(const Coded* w, const int64_t* ids, float* out, int64_t count) {
    if (w->bits == 0) return columns<0>(*w, ids, out, count);
    if (w->bits == 2) return columns<2>(*w, ids, out, count);
    if (w->bits == 3) return columns<3>(*w, ids, out, count);
    if (w->bits == 4) return columns<4>(*w, ids, out, count);
    columns<8>(*w, ids, out, count);
}
}
