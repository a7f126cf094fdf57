// Rotary embedding of q and k, and the write of k and v into the paged cache; see kernels/rope.py.
//
// Every element is two products and one sum, each rounded (no fma), as torch computes it: loops over elements may be vectorised freely.
#pragma once

#include "kv_order.h"

namespace tandem {

struct RopeJob {
    const float* qkv;
    const int64_t *positions, *slots;
    const float *cos, *sin;
    float* q;
    int64_t heads, kv_heads, dim, half;
    bool interleaved;
};

// out = x rotated in its first 2 * half elements (pairs (i, i + half), or (2i, 2i + 1) when interleaved), the rest copied.
inline void rotate(const RopeJob& job, const float* x, const float* cos, const float* sin, float* __restrict out) {
    const int64_t half = job.half;
    if (job.interleaved) {
        for (int64_t i = 0; i < half; ++i) {
            out[2 * i] = x[2 * i] * cos[i] - x[2 * i + 1] * sin[i];
            out[2 * i + 1] = x[2 * i + 1] * cos[i] + x[2 * i] * sin[i];
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
            out[i] = x[i] * cos[i] - x[i + half] * sin[i];
            out[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
        }
    }
    for (int64_t i = 2 * half; i < job.dim; ++i) out[i] = x[i];
}

inline void rope_token(const RopeJob& job, const KvBlocks& blocks, int64_t t) {
    const float* row = job.qkv + t * (job.heads + 2 * job.kv_heads) * job.dim;
    const float *cos = job.cos + job.positions[t] * job.half, *sin = job.sin + job.positions[t] * job.half;
    for (int64_t h = 0; h < job.heads; ++h) rotate(job, row + h * job.dim, cos, sin, job.q + (t * job.heads + h) * job.dim);
    const float* keys = row + job.heads * job.dim;
    const float* values = keys + job.kv_heads * job.dim;
    alignas(64) float rotated[256];
    with_format(blocks.format, [&](auto element) {
        for (int64_t h = 0; h < job.kv_heads; ++h) {
            rotate(job, keys + h * job.dim, cos, sin, rotated);
            write_head<decltype(element)>(blocks, job.slots[t], job.kv_heads, h, rotated, values + h * job.dim, job.dim);
        }
    });
}

}  // namespace tandem
