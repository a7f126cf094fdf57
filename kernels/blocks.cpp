// Whole-block copies within a paged cache; see kernels/blocks.py.

#include "common.h"

extern "C" {

// pairs [count][2] of (source, target). Returns -1, or the index of the first pair out of range with nothing copied.
int64_t tandem_copy_blocks(void* cache, const int64_t* pairs, int64_t count, int64_t num_blocks, int64_t block_bytes) {
    for (int64_t i = 0; i < 2 * count; ++i)
        if (pairs[i] < 0 || pairs[i] >= num_blocks) return i / 2;
    char* base = (char*)cache;
    for (int64_t i = 0; i < count; ++i)
        if (pairs[2 * i] != pairs[2 * i + 1])
            std::memcpy(base + pairs[2 * i + 1] * block_bytes, base + pairs[2 * i] * block_bytes, (size_t)block_bytes);
    return -1;
}
}
