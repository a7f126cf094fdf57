// RMS normalisation; see kernels/norm.py.
//
// The sum of squares runs in four vectors of lanes (element j of a row goes to vector (j / VW) % 4, lane j % VW), then one fixed tree:
// it depends on the row's width only. Tails are read as vectors padded with zeros, never by another loop.
#pragma once

#include "common.h"

namespace tandem {

inline vf at(const float* p, int64_t i, int64_t width) { return width - i >= VW ? load(p + i) : load_part(p + i, (int)(width - i)); }

inline void put(float* p, int64_t i, int64_t width, vf value) {
    if (width - i >= VW)
        store(p + i, value);
    else
        store_part(p + i, value, (int)(width - i));
}

// residual (may be null): added to by x in place, and the sum is normalised. x, out and residual may be one memory.
inline void normalise(const float* x, float* residual, const float* weight, float* out, int64_t width, float eps) {
    vf sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    const float* source = residual ? residual : x;
    for (int64_t i = 0, v = 0; i < width; i += VW, ++v) {
        vf value = at(x, i, width);
        if (residual) {
            value = at(residual, i, width) + value;
            put(residual, i, width, value);
        }
        sums[v % 4] = fma(value, value, sums[v % 4]);
    }
    const float mean = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) / (float)width;
    const vf scale = splat(1.0f / std::sqrt(mean + eps));
    for (int64_t i = 0; i < width; i += VW) put(out, i, width, at(source, i, width) * scale * at(weight, i, width));
}

}  // namespace tandem
