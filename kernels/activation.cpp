// silu(gate) * up; see kernels/activation.py. Element by element with the shared exp; tails are padded vectors.

#include "activation.h"

using namespace tandem;

namespace {

constexpr int64_t PARALLEL_ELEMENTS = 8192;

}  // namespace

extern "C" {

// gate_up [rows][2 * width], gates first -> out [rows][width].
void tandem_silu_mul(const float* gate_up, float* out, int64_t rows, int64_t width, int32_t threads) {
    parallel_static(rows * width < PARALLEL_ELEMENTS ? 1 : threads, rows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const float *gate = gate_up + r * 2 * width, *up = gate + width;
            float* target = out + r * width;
            int64_t i = 0;
            for (; i + VW <= width; i += VW) store(target + i, silu_mul(load(gate + i), load(up + i)));
            const int left = (int)(width - i);
            if (left > 0) store_part(target + i, silu_mul(load_part(gate + i, left), load_part(up + i, left)), left);
        }
    });
}
}
