// The register tile of all float32 products: linear layers, attention scores and attention values.
#pragma once

#include "common.h"

namespace tandem {

constexpr int MAX_ROWS = 6;                     // rows of a register tile
constexpr int TILE_VECTORS = VW == 16 ? 4 : 2;  // its vectors: 6 x 4 of 32 registers, 6 x 2 of 16
constexpr int TILE = TILE_VECTORS * VW;         // its columns

struct FloatWeights {
    typedef float type;
    static inline void expand(const float* w, int vectors, vf* out) {
        for (int v = 0; v < vectors; ++v) out[v] = load(w + v * VW);
    }
};

// c[r][0..VECTORS*VW) (+)= sum over i < k of x[r][i] * w[i][0..VECTORS*VW), one fma after the other in the order of i.
// `first`: from 0, else from c. Each i also prefetches the next LINES cache lines from `ahead` on.
template <class Weights, int ROWS, int VECTORS, int LINES>
inline void tile(const float* x, int64_t x_stride, const typename Weights::type* w, int64_t w_stride, int64_t k, float* c,
                 int64_t c_stride, bool first, const char* ahead) {
    vf sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = first ? splat(0.0f) : load(c + r * c_stride + v * VW);
    for (int64_t i = 0; i < k; ++i) {
        vf b[VECTORS];
        Weights::expand(w + i * w_stride, VECTORS, b);
        for (int line = 0; line < LINES; ++line) __builtin_prefetch(ahead + (i * LINES + line) * 64);
        for (int r = 0; r < ROWS; ++r) {
            const vf a = splat(x[r * x_stride + i]);
            for (int v = 0; v < VECTORS; ++v) sum[r][v] = fma(a, b[v], sum[r][v]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) store(c + r * c_stride + v * VW, sum[r][v]);
}

// The same for 1 <= rows <= MAX_ROWS.
template <class Weights, int VECTORS, int LINES>
inline void tile_rows(int64_t rows, const float* x, int64_t xs, const typename Weights::type* w, int64_t ws, int64_t k, float* c,
                      int64_t cs, bool first, const char* ahead = nullptr) {
    switch (rows) {
        case 1: return tile<Weights, 1, VECTORS, LINES>(x, xs, w, ws, k, c, cs, first, ahead);
        case 2: return tile<Weights, 2, VECTORS, LINES>(x, xs, w, ws, k, c, cs, first, ahead);
        case 3: return tile<Weights, 3, VECTORS, LINES>(x, xs, w, ws, k, c, cs, first, ahead);
        case 4: return tile<Weights, 4, VECTORS, LINES>(x, xs, w, ws, k, c, cs, first, ahead);
        case 5: return tile<Weights, 5, VECTORS, LINES>(x, xs, w, ws, k, c, cs, first, ahead);
        default: return tile<Weights, 6, VECTORS, LINES>(x, xs, w, ws, k, c, cs, first, ahead);
    }
}

}  // namespace tandem
