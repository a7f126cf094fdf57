// Products of int8 rows with 4-bit or 8-bit group-scaled weights; see kernels/int8.py for the format and the promise.
//
// A row is quantised in groups of 32: codes in -127..127, scale = largest magnitude / 127. A weight is d * (code - zero) + m per group of
// 32 along k and per column. Products within a group are exact in int32, so tiles and threads are free choices; across groups every
// output element goes through one fixed chain: group 0, group 1, the two minima, group 2, ...
#pragma once

#include "common.h"

namespace tandem {

constexpr int GROUP = 32;        // k of one scale
constexpr int COLUMNS = 32;      // of a panel: two vectors of 16
constexpr int INT8_ROWS = 8;     // of the register tile: 8 x 2 sums; with more, compilers spill
constexpr int PAIR = 2 * GROUP;  // k is padded to pairs of groups: minima go two groups at a time

// Bytes of a panel for one pair of groups: codes, scales (float16), and for 4 bits minima (bf16, the two groups side by side).
constexpr int64_t pair_bytes(int bits) { return PAIR * COLUMNS * bits / 8 + 2 * COLUMNS * 2 + (bits == 4 ? 2 * COLUMNS * 2 : 0); }
constexpr int64_t codes_bytes(int bits) { return GROUP * COLUMNS * bits / 8; }
constexpr int64_t padded(int64_t k) { return (k + PAIR - 1) / PAIR * PAIR; }
constexpr int32_t zero_of(int bits) { return bits == 4 ? 8 : 128; }

struct Matrix {
    const uint8_t* panels;  // [ceil(n / 32)][padded(k) / 64][pair_bytes]
    const float* bias;      // [n] or null
    int64_t n, k;
    int64_t bits;
};

// Quantised rows; `width` is padded(k). The padding's codes, scales and sums are 0. What goes with groups lies by tiles of rows, so that
// threads which write other groups, or other tiles, rarely write to one cache line.
struct Rows {
    int8_t* codes;    // [rows][width]
    float* scales;    // [tiles][width / 32][INT8_ROWS]
    int32_t* minus8;  // likewise: -8 * sum of the group's codes; -128 * sum is 16 times that
    uint16_t* sums;   // [tiles][width / 64][INT8_ROWS][2] bf16: scale * sum, what minima are multiplied with
    int64_t width;
    int8_t* rest = nullptr;  // where AMX tiles multiply: codes' second part, [held_rows][width] each, and scales [rows]; int8_tiles.h

    int64_t at(int64_t row, int64_t group) const { return (row / INT8_ROWS * (width / GROUP) + group) * INT8_ROWS + row % INT8_ROWS; }
    int64_t sum_at(int64_t row, int64_t group) const { return 2 * (row / INT8_ROWS * (width / PAIR) + group / 2) * INT8_ROWS + row % INT8_ROWS * 2 + group % 2; }
};

// A tile holds rows [i * INT8_ROWS, ...) and so on; the last may be smaller.
static inline int64_t int8_tiles(int64_t rows) { return (rows + INT8_ROWS - 1) / INT8_ROWS; }

// Rows to have memory for where tiles of 16 are read, the last rows of which may be nobody's.
static inline int64_t held_rows(int64_t rows) { return (rows + 15) / 16 * 16; }

// What a tile asks for while it works: `lines` cache lines a group, from `at` on.
struct Ahead {
    const uint8_t* at;
    int64_t lines;
};

// Quantise one group of 32 values. A group with a NaN or an infinity gets a scale that is one too, so that the row's results tell.
static inline void quantise_group(const float* x, const Rows& to, int64_t row, int64_t group) {
    int8_t* codes = to.codes + row * to.width + group * GROUP;
    const int64_t at = to.at(row, group);
    int32_t most = 0, sum = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    const __m512i absolute = _mm512_set1_epi32(0x7FFFFFFF);
    // As integers magnitudes keep their order, and NaN is above all.
    most = _mm512_reduce_max_epi32(
        _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), absolute), _mm512_and_si512(_mm512_castps_si512(b), absolute)));
#else
    for (int i = 0; i < GROUP; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7FFFFFFF;
        most = bits > most ? bits : most;
    }
#endif
    float largest;
    std::memcpy(&largest, &most, 4);
    const bool tiny = largest < 1e-30f;
    const float inverse = tiny ? 0.0f : 127.0f / largest, scale = tiny ? 0.0f : largest / 127.0f;
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const __m512i qa = _mm512_cvtps_epi32(_mm512_mul_ps(a, _mm512_set1_ps(inverse)));
    const __m512i qb = _mm512_cvtps_epi32(_mm512_mul_ps(b, _mm512_set1_ps(inverse)));
    _mm_storeu_si128((__m128i*)codes, _mm512_cvtsepi32_epi8(qa));
    _mm_storeu_si128((__m128i*)(codes + 16), _mm512_cvtsepi32_epi8(qb));
    sum = _mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb));
#else
    for (int i = 0; i < GROUP; ++i) {
        const float scaled = x[i] * inverse;
        const int32_t code = scaled == scaled ? (int32_t)std::nearbyint(scaled) : 0;
        codes[i] = (int8_t)code;
        sum += code;
    }
#endif
    if (!(largest <= 3.4028234e38f)) sum = 0;  // the codes are noise; the scale says so
    to.scales[at] = scale;
    to.minus8[at] = -8 * sum;
    to.sums[to.sum_at(row, group)] = float_to_bf16(scale * (float)sum);
}

// One row of `k` values; the padding is written too.
static inline void quantise_row(const float* x, int64_t k, const Rows& to, int64_t row) {
    const int64_t groups = to.width / GROUP;
    for (int64_t g = 0; g < groups; ++g) {
        if ((g + 1) * GROUP <= k) {
            quantise_group(x + g * GROUP, to, row, g);
            continue;
        }
        alignas(64) float part[GROUP] = {};
        if (g * GROUP < k) std::memcpy(part, x + g * GROUP, (size_t)(k - g * GROUP) * 4);
        quantise_group(part, to, row, g);
    }
}

// What quantising left over of one group, quantised in turn: both together are worth 15 bits.
static inline void quantise_rest(const float* x, const Rows& done, const Rows& to, int64_t row, int64_t group) {
    const float scale = done.scales[done.at(row, group)];
    const int8_t* codes = done.codes + row * done.width + group * GROUP;
    alignas(64) float rest[GROUP];
    for (int i = 0; i < GROUP; ++i) rest[i] = x[i] - scale * (float)codes[i];
    quantise_group(rest, to, row, group);
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)

// Four bytes from memory to every lane: straight from the load port, not through a general register.
static inline __m512i four_codes(const void* at) { return _mm512_broadcastd_epi32(_mm_loadu_si32(at)); }

// c[ROWS][32] (+)= rows [row, row + ROWS) of a tile . panel; `first`: from 0, else from c. `row` is the tile's first.
template <int BITS, int ROWS>
inline void int8_tile(const uint8_t* panel, const Rows& x, int64_t row, bool first, Ahead ahead, float* c) {
    const int64_t groups = x.width / GROUP;
    const int8_t* codes = x.codes + row * x.width;
    const float* scales = x.scales + x.at(row, 0);
    const int32_t* minus8 = x.minus8 + x.at(row, 0);
    const uint16_t* sums = x.sums + x.sum_at(row, 0);
    const __m512i low = _mm512_set1_epi8(15);
    for (int i = 0; first && i < ROWS * COLUMNS; i += 16) _mm512_store_ps(c + i, _mm512_setzero_ps());
    for (int64_t g = 0; g < groups; ++g, scales += INT8_ROWS, minus8 += INT8_ROWS) {
        // Into the second level of cache: more requests can be under way there.
        for (int64_t i = 0; i < ahead.lines; ++i, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
        __m512i sum0[ROWS], sum1[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const __m512i start = _mm512_set1_epi32(minus8[r]);
            sum0[r] = sum1[r] = BITS == 4 ? start : _mm512_slli_epi32(start, 4);
        }
        const int8_t* at = codes + g * GROUP;
        if (BITS == 4) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const __m512i z0 = _mm512_loadu_si512(panel + i * 128), z1 = _mm512_loadu_si512(panel + i * 128 + 64);
                const __m512i a0 = _mm512_and_si512(z0, low), a1 = _mm512_and_si512(z1, low);
                const __m512i b0 = _mm512_and_si512(_mm512_srli_epi16(z0, 4), low), b1 = _mm512_and_si512(_mm512_srli_epi16(z1, 4), low);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r) {
                    const __m512i xa = four_codes(at + r * x.width + i * 8), xb = four_codes(at + r * x.width + i * 8 + 4);
                    sum0[r] = _mm512_dpbusd_epi32(sum0[r], a0, xa);
                    sum1[r] = _mm512_dpbusd_epi32(sum1[r], a1, xa);
                    sum0[r] = _mm512_dpbusd_epi32(sum0[r], b0, xb);
                    sum1[r] = _mm512_dpbusd_epi32(sum1[r], b1, xb);
                }
            }
        } else {
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                const __m512i z0 = _mm512_loadu_si512(panel + i * 128), z1 = _mm512_loadu_si512(panel + i * 128 + 64);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r) {
                    const __m512i four = four_codes(at + r * x.width + i * 4);
                    sum0[r] = _mm512_dpbusd_epi32(sum0[r], z0, four);
                    sum1[r] = _mm512_dpbusd_epi32(sum1[r], z1, four);
                }
            }
        }
        panel += codes_bytes(BITS);
        const __m512 d0 = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)panel));
        const __m512 d1 = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(panel + 32)));
        panel += 2 * COLUMNS;
        const bool with_minima = BITS == 4 && (g & 1);
        const __m512i m0 = with_minima ? _mm512_loadu_si512(panel) : _mm512_setzero_si512();
        const __m512i m1 = with_minima ? _mm512_loadu_si512(panel + 64) : _mm512_setzero_si512();
        if (with_minima) panel += 4 * COLUMNS;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            float* to = c + r * COLUMNS;
            const __m512 scale = _mm512_set1_ps(scales[r]);
            __m512 c0 = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum0[r]), scale), d0, _mm512_load_ps(to));
            __m512 c1 = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum1[r]), scale), d1, _mm512_load_ps(to + 16));
            if (with_minima) {
                const __m512i pair = four_codes(sums + 2 * r);
#if defined(__AVX512BF16__)
                c0 = _mm512_dpbf16_ps(c0, (__m512bh)m0, (__m512bh)pair);
                c1 = _mm512_dpbf16_ps(c1, (__m512bh)m1, (__m512bh)pair);
#else
                const __m512i high = _mm512_set1_epi32((int32_t)0xFFFF0000u);
                const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), odd = _mm512_castsi512_ps(_mm512_and_si512(pair, high));
                c0 = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(m0, 16)), even, c0);
                c0 = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(m0, high)), odd, c0);
                c1 = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(m1, 16)), even, c1);
                c1 = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(m1, high)), odd, c1);
#endif
            }
            _mm512_store_ps(to, c0);
            _mm512_store_ps(to + 16, c1);
        }
        sums += (g & 1) * 2 * INT8_ROWS;
    }
}

#else

// The same for machines without AVX-512 VNNI: plain loops that the compiler vectorises over columns.
template <int BITS, int ROWS>
inline void int8_tile(const uint8_t* panel, const Rows& x, int64_t row, bool first, Ahead, float* c) {
    const int64_t groups = x.width / GROUP;
    for (int i = 0; first && i < ROWS * COLUMNS; ++i) c[i] = 0.0f;
    alignas(64) int16_t weights[GROUP * COLUMNS];  // [k][column]
    alignas(64) float d[COLUMNS];
    for (int64_t g = 0; g < groups; ++g) {
        for (int k = 0; k < GROUP; ++k)
            for (int v = 0; v < 2; ++v)
                for (int j = 0; j < 16; ++j) {
                    const uint8_t* block = panel + (BITS == 4 ? k / 8 : k / 4) * 128 + v * 64;
                    const uint8_t byte = block[j * 4 + k % 4];
                    weights[k * COLUMNS + v * 16 + j] = BITS == 4 ? (k % 8 < 4 ? byte & 15 : byte >> 4) : byte;
                }
        panel += codes_bytes(BITS);
        for (int j = 0; j < COLUMNS; ++j) {
            uint16_t bits;
            std::memcpy(&bits, panel + 2 * j, 2);
            d[j] = half_to_float(bits);
        }
        panel += 2 * COLUMNS;
        const bool with_minima = BITS == 4 && (g & 1);
        for (int r = 0; r < ROWS; ++r) {
            const int64_t at = x.at(row + r, g);
            const int8_t* codes = x.codes + (row + r) * x.width + g * GROUP;
            alignas(64) int32_t sum[COLUMNS];
            for (int j = 0; j < COLUMNS; ++j) sum[j] = BITS == 4 ? x.minus8[at] : x.minus8[at] * 16;
            for (int k = 0; k < GROUP; ++k)
                for (int j = 0; j < COLUMNS; ++j) sum[j] += (int32_t)weights[k * COLUMNS + j] * codes[k];
            float* to = c + r * COLUMNS;
            for (int j = 0; j < COLUMNS; ++j) to[j] = to[j] + (float)sum[j] * x.scales[at] * d[j];
            if (!with_minima) continue;
            const float even = bf16_to_float(x.sums[x.sum_at(row + r, g - 1)]), odd = bf16_to_float(x.sums[x.sum_at(row + r, g)]);
            for (int j = 0; j < COLUMNS; ++j) {
                uint16_t m[2];
                std::memcpy(m, panel + 4 * j, 4);
                to[j] = (to[j] + bf16_to_float(m[0]) * even) + bf16_to_float(m[1]) * odd;
            }
        }
        if (with_minima) panel += 4 * COLUMNS;
    }
}

#endif

template <int BITS>
inline void int8_tile_rows(int64_t rows, const uint8_t* panel, const Rows& x, int64_t row, bool first, Ahead ahead, float* c) {
    switch (rows) {
        case 1: return int8_tile<BITS, 1>(panel, x, row, first, ahead, c);
        case 2: return int8_tile<BITS, 2>(panel, x, row, first, ahead, c);
        case 3: return int8_tile<BITS, 3>(panel, x, row, first, ahead, c);
        case 4: return int8_tile<BITS, 4>(panel, x, row, first, ahead, c);
        case 5: return int8_tile<BITS, 5>(panel, x, row, first, ahead, c);
        case 6: return int8_tile<BITS, 6>(panel, x, row, first, ahead, c);
        case 7: return int8_tile<BITS, 7>(panel, x, row, first, ahead, c);
        default: return int8_tile<BITS, 8>(panel, x, row, first, ahead, c);
    }
}

// c[rows][32] (+)= for 1 <= rows <= INT8_ROWS: rows [row, row + rows) of x, a tile, times panel number `panel`.
static inline void int8_panel(const Matrix& w, int64_t panel, const Rows& x, int64_t row, int64_t rows, bool first, float* c,
                              Ahead ahead = {nullptr, 0}) {
    const uint8_t* data = w.panels + panel * (x.width / PAIR) * pair_bytes((int)w.bits);
    if (w.bits == 4)
        int8_tile_rows<4>(rows, data, x, row, first, ahead, c);
    else
        int8_tile_rows<8>(rows, data, x, row, first, ahead, c);
}

// Tile i's share of asking for the panel behind `panel`, for `tiles` tiles of `rows` rows each. Few rows take a panel as fast as it comes.
static inline Ahead next_panel(const Matrix& w, int64_t panel, int64_t width, int64_t i, int64_t tiles, int64_t rows) {
    if (rows < 4 || (panel + 1) * COLUMNS >= w.n) return Ahead{nullptr, 0};
    const int64_t bytes = pair_bytes((int)w.bits), lines = (bytes / 2 / 64 + tiles - 1) / tiles;
    return Ahead{w.panels + (panel + 1) * (width / PAIR) * bytes + i * lines * 64 * (width / GROUP), lines};
}

// One weight row (an output column), dequantised.
static inline void int8_column(const Matrix& w, int64_t column, float* out) {
    const int bits = (int)w.bits;
    const int64_t pairs = padded(w.k) / PAIR, j = column % COLUMNS, v = j / 16, lane = j % 16;
    const uint8_t* at = w.panels + column / COLUMNS * pairs * pair_bytes(bits);
    for (int64_t p = 0; p < pairs; ++p, at += pair_bytes(bits))
        for (int h = 0; h < 2; ++h) {
            const uint8_t* codes = at + h * (codes_bytes(bits) + 2 * COLUMNS);
            uint16_t scale, minimum = 0;
            std::memcpy(&scale, codes + codes_bytes(bits) + 2 * j, 2);
            if (bits == 4) std::memcpy(&minimum, at + pair_bytes(bits) - 4 * COLUMNS + 4 * j + 2 * h, 2);
            const float d = half_to_float(scale), m = bf16_to_float(minimum);
            for (int k = 0; k < GROUP && p * PAIR + h * GROUP + k < w.k; ++k) {
                const uint8_t byte = codes[(bits == 4 ? k / 8 : k / 4) * 128 + v * 64 + lane * 4 + k % 4];
                const int32_t code = bits == 4 ? (k % 8 < 4 ? byte & 15 : byte >> 4) : byte;
                out[p * PAIR + h * GROUP + k] = d * (float)(code - zero_of(bits)) + m;
            }
        }
}

}  // namespace tandem
