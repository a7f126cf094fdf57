// The entry to rotary embedding and the write to the cache; see kernels/rope.py and rope.h.

#include "rope.h"

using namespace tandem;

namespace {

constexpr int64_t PARALLEL_ELEMENTS = 16384;

}  // namespace

extern "C" {

// Returns -1, or the index of the first token whose position or slot is out of range, with nothing written. dim <= 256. `scales`, with
// their stride between blocks, are those of formats that have them; key_scale and value_scale 0 mean each row's own.
int64_t tandem_rope_and_store(const float* qkv, const int64_t* positions, const int64_t* slots, const float* cos, const float* sin,
                              void* cache, float* scales, float* q, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t half,
                              int64_t max_positions, int64_t num_blocks, int64_t block_size, int64_t block_stride,
                              int64_t scales_stride, float key_scale, float value_scale, int32_t format, int32_t interleaved,
                              int32_t threads) {
    for (int64_t t = 0; t < tokens; ++t)
        if (positions[t] < 0 || positions[t] >= max_positions || slots[t] < 0 || slots[t] >= num_blocks * block_size) return t;
    const RopeJob job{qkv, positions, slots, cos, sin, q, heads, kv_heads, dim, half, interleaved != 0};
    const KvBlocks blocks{cache, scales, block_stride, scales_stride, block_size, format, false, key_scale, value_scale};
    const int64_t elements = tokens * (heads + 2 * kv_heads) * dim;
    parallel_static(elements < PARALLEL_ELEMENTS ? 1 : threads, tokens, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) rope_token(job, blocks, t);
    });
    return -1;
}
}
