// The entries to RMS normalisation; see kernels/norm.py and norm.h.

#include "norm.h"

using namespace tandem;

namespace {

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
