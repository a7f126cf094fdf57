// Products of int8 by AMX tiles, where the CPU has them: weights as int8 with one scale a column, rows as 15 bits with one scale a row.
//
// Both are coarser in scales and finer in codes than what int8.h multiplies, and sums over the whole of k are exact integers: a row's
// bits are free of the other rows, the tiles and the threads, and no scale is met before the end. A row is two int8 parts, the second in
// units of 1/254 of the first's. Panels of 32 columns lie as tiles take them: [padded(k) / 64][2 vectors of columns][16][16 columns][4 of k],
// then the columns' scales. Source: Intel's Architecture Instruction Set Extensions Programming Reference, chapter on AMX.
#pragma once

#include <type_traits>

#include "int8.h"
#include "tiles.h"

namespace tandem {

#if TANDEM_TILES

constexpr int TILE_K = 64;        // of k that one tile of rows holds
constexpr int TILE_BYTES = 1024;  // of weights: 64 of k, 16 columns
constexpr float REST_UNIT = 1.0f / 254.0f;
static_assert(TILE_K == PAIR, "padded(k) is whole tiles");

static inline int64_t tile_panel_bytes(int64_t k) { return padded(k) / TILE_K * 2 * TILE_BYTES + COLUMNS * 4; }
static inline float* tile_scales(uint8_t* panel, int64_t k) { return (float*)(panel + padded(k) / TILE_K * 2 * TILE_BYTES); }
static inline int64_t tile_place(int64_t k, int64_t column) { return k / TILE_K * 2 * TILE_BYTES + column / 16 * TILE_BYTES + k % TILE_K / 4 * 64 + column % 16 * 4 + k % 4; }

// The largest magnitude of a row; a NaN is above all.
static inline float largest_of(const float* x, int64_t k) {
    int32_t most = 0;
    for (int64_t i = 0; i < k; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7FFFFFFF;
        most = bits > most ? bits : most;
    }
    float out;
    std::memcpy(&out, &most, 4);
    return out;
}

// A weight row as output column `column` of its panel. One with a NaN or an infinity gets a scale that is one too.
static inline void pack_tile_column(const float* weight, int64_t k, uint8_t* panel, int64_t column) {
    const float largest = largest_of(weight, k), inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
    tile_scales(panel, k)[column] = largest > 1e-30f || largest != largest ? largest / 127.0f : 0.0f;
    for (int64_t i = 0; i < k; ++i) {
        const float code = std::nearbyint(weight[i] * inverse);
        panel[tile_place(i, column)] = (uint8_t)(int8_t)(code >= -127.0f && code <= 127.0f ? code : 0.0f);
    }
}

static inline void tile_column(const Matrix& w, int64_t column, float* out) {
    uint8_t* panel = (uint8_t*)w.panels + column / COLUMNS * tile_panel_bytes(w.k);
    const float scale = tile_scales(panel, w.k)[column % COLUMNS];
    for (int64_t i = 0; i < w.k; ++i) out[i] = scale * (float)(int8_t)panel[tile_place(i, column % COLUMNS)];
}

// Both parts of a row. One with a NaN or an infinity gets a scale that is one too, so that the row's results tell.
static inline void quantise_whole(const float* x, int64_t k, const Rows& to, int64_t row) {
    int8_t *codes = to.codes + row * to.width, *rest = to.rest + row * to.width;
    const float largest = largest_of(x, k);
    const bool tiny = largest < 1e-30f;
    const float inverse = tiny ? 0.0f : 127.0f / largest;
    to.scales[row] = tiny ? 0.0f : largest / 127.0f;
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(inverse));
        const __m512i code = _mm512_cvtps_epi32(scaled);
        const __m512 left = _mm512_mul_ps(_mm512_sub_ps(scaled, _mm512_cvtepi32_ps(code)), _mm512_set1_ps(254.0f));
        _mm_storeu_si128((__m128i*)(codes + i), _mm512_cvtsepi32_epi8(code));
        _mm_storeu_si128((__m128i*)(rest + i), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(left)));
    }
    for (; i < to.width; ++i) {
        const float scaled = i < k ? x[i] * inverse : 0.0f, code = scaled == scaled ? std::nearbyint(scaled) : 0.0f;
        codes[i] = (int8_t)code;
        rest[i] = (int8_t)std::nearbyint(scaled == scaled ? (scaled - code) * 254.0f : 0.0f);
    }
}

// Sums of rows [row, row + 16) of x times a panel, as many rows as the tiles are set up for: of the first parts, then of the second.
// `ahead`: where to ask for memory meanwhile, or null.
struct alignas(64) TileSums {
    int32_t parts[2][TILE_ROWS][COLUMNS];

    void multiply(const uint8_t* panel, const Rows& x, int64_t row, const uint8_t* ahead) {
        const int8_t *codes = x.codes + row * x.width, *rest = x.rest + row * x.width;
        const uint8_t* at = panel;
        TileHold::fence();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < x.width; k += TILE_K, at += 2 * TILE_BYTES) {
            if (ahead != nullptr)
                for (int64_t i = 0; i < 2 * TILE_BYTES; i += 64) __builtin_prefetch(ahead + (at - panel) + i, 0, 2);
            _tile_loadd(4, codes + k, x.width);
            _tile_loadd(6, at, 64);
            _tile_dpbssd(0, 4, 6);
            _tile_loadd(7, at + TILE_BYTES, 64);
            _tile_dpbssd(1, 4, 7);
            _tile_loadd(5, rest + k, x.width);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
        _tile_stored(0, parts[0][0], COLUMNS * 4);
        _tile_stored(1, parts[0][0] + 16, COLUMNS * 4);
        _tile_stored(2, parts[1][0], COLUMNS * 4);
        _tile_stored(3, parts[1][0] + 16, COLUMNS * 4);
        TileHold::fence();
    }
    // 16 columns of a row, in units of its scale.
    __m512 operator()(int64_t r, int64_t column) const {
        const __m512 first = _mm512_cvtepi32_ps(_mm512_load_si512(parts[0][r] + column)), second = _mm512_cvtepi32_ps(_mm512_load_si512(parts[1][r] + column));
        return _mm512_fmadd_ps(second, _mm512_set1_ps(REST_UNIT), first);
    }
};

// Whether a finish takes a row's two vectors as they are, by finish.row(row, panel, first, second): it says so by TAKES_ROWS.
template <class Finish, class = void>
struct TakesRows : std::false_type {};
template <class Finish>
struct TakesRows<Finish, std::void_t<decltype(Finish::TAKES_ROWS)>> : std::true_type {};

// Rows [begin, end) of x times panels [first, last); finish as `int8_product` has it.
template <class Finish>
inline void tile_product(const Matrix& w, int64_t first, int64_t last, const Rows& x, int64_t begin, int64_t end, const Finish& finish) {
    if (begin >= end) return;
    const int64_t bytes = tile_panel_bytes(w.k), panels = (w.n + COLUMNS - 1) / COLUMNS;
    TileShapes shapes;
    shapes.set(0, 6, end - begin < TILE_ROWS ? end - begin : (int64_t)TILE_ROWS, 64);
    shapes.set(6, 8, TILE_K / 4, 64);
    const TileHold hold(shapes);
    TileSums sums;
    alignas(64) float c[COLUMNS];
    for (int64_t row = begin; row < end; row += TILE_ROWS)
        for (int64_t p = first; p < last; ++p) {
            const int64_t count = end - row < TILE_ROWS ? end - row : (int64_t)TILE_ROWS, next = p + last - first;
            uint8_t* panel = (uint8_t*)w.panels + p * bytes;
            sums.multiply(panel, x, row, row == begin && next < panels ? w.panels + next * bytes : nullptr);
            const float* scales = tile_scales(panel, w.k);
            const __m512 left = _mm512_loadu_ps(scales), right = _mm512_loadu_ps(scales + 16);
            for (int64_t r = 0; r < count; ++r) {
                const __m512 scale = _mm512_set1_ps(x.scales[row + r]);
                const __m512 one = _mm512_mul_ps(_mm512_mul_ps(sums(r, 0), scale), left), two = _mm512_mul_ps(_mm512_mul_ps(sums(r, 16), scale), right);
                if constexpr (TakesRows<Finish>::value) {
                    finish.row(row + r, p, one, two);
                } else {
                    _mm512_store_ps(c, one);
                    _mm512_store_ps(c + 16, two);
                    finish(row + r, 1, p, c);
                }
            }
        }
}

#endif

// One weight row (an output column), dequantised: for a tied LM head read as the embedding table.
static inline void weight_row(const Matrix& w, int64_t column, float* out) {
#if TANDEM_TILES
    if (Tiles::used()) return tile_column(w, column, out);
#endif
    int8_column(w, column, out);
}

// Rows as this process multiplies them.
static inline void quantise(const float* x, int64_t k, const Rows& to, int64_t row) {
#if TANDEM_TILES
    if (to.rest != nullptr) return quantise_whole(x, k, to, row);
#endif
    quantise_row(x, k, to, row);
}

// Tiles [begin, end) of INT8_ROWS rows (`rows` in all; `begin` is even) times panels [first, last) of w; and of `more`, if there is any,
// added to it. finish(row, count, panel, c) gets the sums c[count][32] of at most INT8_ROWS rows.
template <class Finish>
inline void int8_product(const Matrix& w, int64_t first, int64_t last, const Rows& x, const Rows* more, int64_t rows, int64_t begin, int64_t end,
                         const Finish& finish) {
#if TANDEM_TILES
    if (x.rest != nullptr) {
        tile_product(w, first, last, x, begin * INT8_ROWS, end < int8_tiles(rows) ? end * INT8_ROWS : rows, finish);
        return;
    }
#endif
    alignas(64) float c[INT8_ROWS * COLUMNS];
    for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i * INT8_ROWS, count = rows - row < INT8_ROWS ? rows - row : (int64_t)INT8_ROWS;
        for (int64_t p = first; p < last; ++p) {
            int8_panel(w, p, x, row, count, true, c, next_panel(w, p, x.width, i - begin, end - begin, rows));
            if (more) int8_panel(w, p, *more, row, count, false, c);
            finish(row, count, p, c);
        }
    }
}

}  // namespace tandem
