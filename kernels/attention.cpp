// The entry to paged attention; see kernels/attention.py and attention.h.

#include "attention_bf16.h"

using namespace tandem;

extern "C" {

void tandem_want_tiles(int32_t tiles) { Tiles::want(tiles != 0); }

// 1: heads of `dim` can be multiplied in bf16 on this machine.
int32_t tandem_bf16_attention_fits(int64_t dim) { return bf16_attention_fits(dim); }

// Returns -1, or the index of the first sequence with an impossible length or block, with nothing written.
// dim <= 256; heads / kv_heads <= 96; window 0 means none; `rounded` and `paired` as in attention_bf16.h; paired only
// where tandem_bf16_attention_fits; `scales` where the format has them.
int64_t tandem_paged_attention(const float* q, const void* cache, const float* scales, const int32_t* tables, const int32_t* query_starts,
                               const int32_t* context_lens, float* out, int64_t sequences, int64_t tokens, int64_t heads, int64_t kv_heads,
                               int64_t dim, int64_t num_blocks, int64_t block_size, int64_t block_stride, int64_t table_stride,
                               int64_t scales_stride, int64_t window, float scale, int32_t format, int32_t rounded, int32_t paired,
                               int32_t threads) {
    const AttentionCall call{q,        out,        cache,      tables,       query_starts, context_lens, heads, kv_heads, dim,
                    num_blocks, block_size, block_stride, table_stride, window,       scale,      paired != 0,
                    format,     scales,     scales_stride};
    const int64_t bad = find_bad_sequence(call, sequences, tokens);
    if (bad >= 0) return bad;
    std::vector<AttentionTask> tasks;
    list_tasks(call, sequences, false, tasks);
    parallel_dynamic(threads, (int64_t)tasks.size(), [&](int64_t i) {
        attend(call, tasks[(size_t)i], rounded != 0);
    });
    return -1;
}
}
