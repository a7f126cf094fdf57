// RMS normalisation; see kernels/norm.py.
//
// The sum of squares runs in four vectors of lanes (element j of a row goes to vector (j / VW) % 4, lane j % VW), then one fixed tree:
// it depends on the row's width only. Tails are read as vectors padded with zeros, never by another loop.

#include "common.h"

using namespace tandem;

namespace {

inline vf at(const float* p, int64_t i, int64_t width) { return width - i >= VW ? load(p + i) : load_part(p + i, (int)(width - i)); }

inline void put(float* p, int64_t i, int64_t width, vf value) {
    if (width - i >= VW)
        store(p + i, value);
    else
        store_part(p + i, value, (int)(width - i));
}

// residual (may be null): added to by x in place, and the sum is normalised. x, out and residual may be one memory.
void normalise(const float* x, float* residual, const float* weight, float* out, int64_t width, float eps) {
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

constexpr int64_t PARALLEL_ELEMENTS = 16384;  // below, waking threads costs more than the work

}  // namespace

extern "C" {

// out[rows][width] = rms_norm(x [+ residual]) * weight; residual (or null) becomes the sum.
void tandem_rms_norm(const float* x, float* residual, const float* weight, float* out, int64_t rows, int64_t width, float eps,
                     int32_t threads) {
    parallel_static(rows * width < PARALLEL_ELEMENTS ? 1 : threads, rows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            normalise(x + r * width, residual ? residual + r * width : nullptr, weight, out + r * width, width, eps);
    });
}

// The same for each head of each row; a row's heads are dense, rows are `x_stride` and `out_stride` elements apart.
void tandem_rms_norm_heads(const float* x, const float* weight, float* out, int64_t rows, int64_t heads, int64_t dim, int64_t x_stride,
                           int64_t out_stride, float eps, int32_t threads) {
    parallel_static(rows * heads * dim < PARALLEL_ELEMENTS ? 1 : threads, rows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            for (int64_t h = 0; h < heads; ++h)
                normalise(x + r * x_stride + h * dim, nullptr, weight, out + r * out_stride + h * dim, dim, eps);
    });
}
}
