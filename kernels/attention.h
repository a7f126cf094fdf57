// Causal attention over the paged cache, decode and chunked prefill alike; see kernels/attention.py.
//
// A task is one KV head and a tile of consecutive queries of one sequence (all query heads of the group: rows). It walks over absolute tiles
// of 64 positions, aligned at position 0 whatever the block size, the chunking or the window: keys are transposed to [dim][64], values
// copied to [64][dim], both as float32, codes times their position's scale. For a row and a tile: each score is one fma chain over dim; the maximum and the sum of the
// tile's 64 lanes use fixed trees; each output element is one fma chain over exactly the positions that the row sees. So a row's bits
// depend on its query and on the keys and values it sees, and on nothing else, not even on what lies in lanes it must not see.
#pragma once

#include <vector>

#include "kv_codes.h"
#include "tile.h"

namespace tandem {

constexpr int POSITIONS = 64;  // of an absolute tile
constexpr int GROUP_ROWS = 96; // rows (queries x heads of the group) of a task
constexpr int MAX_DIM = 256;

struct AttentionCall {
    const float* q;
    float* out;
    const void* cache;
    const int32_t *tables, *query_starts, *context_lens;
    int64_t heads, kv_heads, dim, num_blocks, block_size, block_stride, table_stride, window;
    float scale;
    bool paired;  // the cache's order, as in kernels/kv_order.py; only attention_bf16.h reads that one
    int64_t format;  // of the cache: a KvFormat
    const float* scales;  // of positions, where the format has them, with the stride between their blocks
    int64_t scales_stride;
};

struct AttentionTask {
    int32_t sequence, kv_head;
    int64_t query, count;   // first query within the sequence, number of queries
    int64_t kv_heads;      // heads [kv_head, kv_head + kv_heads): more than one only with one query, where `attend` takes that
};

// Where a task's rows stand.
struct AttentionRows {
    alignas(64) float scores[(GROUP_ROWS + 15) * POSITIONS];  // AMX tiles write whole
    alignas(64) float out[GROUP_ROWS * MAX_DIM];
    float highest[GROUP_ROWS], total[GROUP_ROWS];
    int64_t begin[GROUP_ROWS], end[GROUP_ROWS];  // positions of the current tile that the row sees, relative to the tile
};

struct AttentionScratch : AttentionRows {
    alignas(64) float keys[MAX_DIM * POSITIONS];
    alignas(64) float values[POSITIONS * MAX_DIM];
    alignas(64) float q[GROUP_ROWS * MAX_DIM];
};

// Transpose VW rows in place: lane j of row i goes to lane i of row j.
inline void transpose(vf* rows) {
#if defined(__AVX512F__)
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm512_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm512_shuffle_ps(a[i + j], a[i + j + 2], 0xEE);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; ++j) {
            a[i + j] = _mm512_shuffle_f32x4(b[i + j], b[i + j + 4], 0x88);
            a[i + j + 4] = _mm512_shuffle_f32x4(b[i + j], b[i + j + 4], 0xDD);
        }
    for (int j = 0; j < 8; ++j) {
        const __m512 even = _mm512_shuffle_f32x4(a[j], a[j + 8], 0x88), odd = _mm512_shuffle_f32x4(a[j], a[j + 8], 0xDD);
        rows[j] = (vf)even;
        rows[j + 8] = (vf)odd;
    }
#else
    alignas(64) float lanes[VW][VW];
    for (int i = 0; i < VW; ++i) store(lanes[i], rows[i]);
    for (int i = 0; i < VW; ++i)
        for (int j = 0; j < VW; ++j) rows[i][j] = lanes[j][i];
#endif
}

// Calls body(j, the scale of position j's key, that of its value) for positions [begin, end) of the tile at `start`.
template <class Body>
inline void each_scale(const AttentionCall& call, int64_t sequence, int64_t kv_head, int64_t start, int64_t begin, int64_t end, const Body& body) {
    const int32_t* table = call.tables + sequence * call.table_stride;
    int64_t index = (start + begin) / call.block_size, offset = (start + begin) % call.block_size;
    for (int64_t j = begin; j < end; ++index, offset = 0) {
        const float* keys = call.scales + table[index] * call.scales_stride + kv_head * call.block_size;
        const float* values = keys + call.kv_heads * call.block_size;
        for (; j < end && offset < call.block_size; ++j, ++offset) body(j, keys[offset], values[offset]);
    }
}

// Bring positions [begin, end) of the tile at `start` into scratch: keys transposed (other lanes 0), values as rows.
template <class T>
void load_tile(const AttentionCall& call, const AttentionTask& task, int64_t start, int64_t begin, int64_t end, AttentionScratch& s) {
    const int32_t* table = call.tables + task.sequence * call.table_stride;
    const int64_t padded = (call.dim + VW - 1) / VW * VW, to_values = call.kv_heads * call.block_size * call.dim;
    const T* rows[POSITIONS];
    int64_t index = (start + begin) / call.block_size, offset = (start + begin) % call.block_size;
    for (int64_t j = begin; j < end; ++j) {
        rows[j] = (const T*)call.cache + table[index] * call.block_stride + (task.kv_head * call.block_size + offset) * call.dim;
        if (++offset == call.block_size) offset = 0, ++index;
    }
    float key_scales[POSITIONS], value_scales[POSITIONS];
    if (HAS_SCALES<T>)
        each_scale(call, task.sequence, task.kv_head, start, begin, end,
                   [&](int64_t j, float key, float value) { key_scales[j] = key, value_scales[j] = value; });
    const auto read = [](const T* p, int64_t left, const float* scale) {
        return HAS_SCALES<T> ? load_cached(p, left) * splat(*scale) : load_cached(p, left);
    };
    for (int64_t j0 = begin / VW * VW; j0 < end; j0 += VW)
        for (int64_t d = 0; d < call.dim; d += VW) {
            vf square[VW];
            for (int64_t j = 0; j < VW; ++j)
                square[j] = j0 + j >= begin && j0 + j < end ? read(rows[j0 + j] + d, call.dim - d, key_scales + j0 + j) : splat(0.0f);
            transpose(square);
            for (int64_t i = 0; i < VW; ++i) store(s.keys + (d + i) * POSITIONS + j0, square[i]);
        }
    for (int64_t j = begin; j < end; ++j)
        for (int64_t d = 0; d < call.dim; d += VW) store(s.values + j * padded + d, read(rows[j] + to_values + d, call.dim - d, value_scales + j));
}

// Turn a row's 64 scores into weights (0 where it must not see), and update its maximum, total and output so far.
inline void soften(const AttentionCall& call, AttentionScratch& s, int64_t row, int64_t padded) {
    constexpr int VECTORS = POSITIONS / VW;
    float* scores = s.scores + row * POSITIONS;
    vi lane;
    for (int i = 0; i < VW; ++i) lane[i] = i;
    vf value[VECTORS], best = splat(-INFINITY);
    vi seen[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
        const vi position = lane + v * VW;
        seen[v] = (position >= (int32_t)s.begin[row]) & (position < (int32_t)s.end[row]);
        value[v] = select(seen[v], load(scores + v * VW) * splat(call.scale), splat(-INFINITY));
        best = max(best, value[v]);
    }
    const float before = s.highest[row], tile_best = max_lanes(best), now = tile_best > before ? tile_best : before;
    for (int v = 0; v < VECTORS; ++v) {
        value[v] = select(seen[v], tandem::exp(value[v] - splat(now)), splat(0.0f));
        store(scores + v * VW, value[v]);
    }
    for (int half = VECTORS / 2; half > 0; half /= 2)
        for (int v = 0; v < half; ++v) value[v] = value[v] + value[v + half];
    const float tile_total = sum_lanes(value[0]);
    s.highest[row] = now;
    if (now == before) {
        s.total[row] = s.total[row] + tile_total;
        return;
    }
    const vf shrink = tandem::exp(splat(before - now));
    s.total[row] = s.total[row] * shrink[0] + tile_total;
    for (int64_t d = 0; d < padded; d += VW) store(s.out + row * padded + d, load(s.out + row * padded + d) * shrink);
}

inline void score_rows(const AttentionCall& call, AttentionScratch& s, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += MAX_ROWS) {
        const int64_t count = last - row < MAX_ROWS ? last - row : MAX_ROWS;
        for (int64_t j = 0; j < POSITIONS; j += TILE)
            tile_rows<FloatWeights, TILE_VECTORS, 0>(count, s.q + row * call.dim, call.dim, s.keys + j, POSITIONS, call.dim,
                                                     s.scores + row * POSITIONS + j, POSITIONS, true);
    }
}

// out += weights . values; rows that see the same positions go together, each over exactly those positions.
inline void add_values(AttentionScratch& s, int64_t first, int64_t last, int64_t padded) {
    for (int64_t row = first; row < last;) {
        int64_t count = 1;
        while (count < MAX_ROWS && row + count < last && s.begin[row + count] == s.begin[row] && s.end[row + count] == s.end[row]) ++count;
        const int64_t begin = s.begin[row], length = s.end[row] - begin;
        const float *weights = s.scores + row * POSITIONS + begin, *values = s.values + begin * padded;
        float* out = s.out + row * padded;
        int64_t d = 0;
        for (; d + TILE <= padded; d += TILE)
            tile_rows<FloatWeights, TILE_VECTORS, 0>(count, weights, POSITIONS, values + d, padded, length, out + d, padded, false);
        for (; d < padded; d += VW)
            tile_rows<FloatWeights, 1, 0>(count, weights, POSITIONS, values + d, padded, length, out + d, padded, false);
        row += count;
    }
}

struct Span {
    int64_t context, first_query, group;  // KV length, absolute position of the task's first query, query heads a KV head
};

// Set each row's visible part of the tile at `start`; rows [first, last) see something.
inline void visible_rows(const AttentionCall& call, const AttentionTask& task, const Span& span, int64_t start, AttentionRows& s, int64_t& first, int64_t& last) {
    first = last = 0;
    for (int64_t i = 0; i < task.count; ++i) {
        const int64_t position = span.first_query + i, oldest = call.window > 0 ? position - call.window + 1 : 0;
        const int64_t begin = oldest > start ? oldest - start : 0, end = position + 1 - start < POSITIONS ? position + 1 - start : POSITIONS;
        for (int64_t g = 0; g < span.group; ++g) s.begin[i * span.group + g] = begin, s.end[i * span.group + g] = end;
        if (begin >= end) continue;
        if (last == 0) first = i * span.group;
        last = (i + 1) * span.group;
    }
}

template <class T>
void run_task(const AttentionCall& call, const AttentionTask& task) {
    AttentionScratch s;
    const int64_t query0 = call.query_starts[task.sequence], queries = call.query_starts[task.sequence + 1] - query0;
    const int64_t group = call.heads / call.kv_heads, rows = task.count * group, padded = (call.dim + VW - 1) / VW * VW;
    const int64_t context = call.context_lens[task.sequence];
    const Span span{context, context - queries + task.query, group};
    for (int64_t i = 0; i < task.count; ++i)
        std::memcpy(s.q + i * group * call.dim,
                    call.q + ((query0 + task.query + i) * call.heads + task.kv_head * group) * call.dim, (size_t)(group * call.dim) * 4);
    std::memset(s.out, 0, (size_t)(rows * padded) * 4);
    for (int64_t row = 0; row < rows; ++row) s.highest[row] = -INFINITY, s.total[row] = 0.0f;
    const int64_t oldest = call.window > 0 && span.first_query >= call.window ? span.first_query - call.window + 1 : 0;
    const int64_t newest = span.first_query + task.count;  // one past the last position that any row sees
    for (int64_t start = oldest / POSITIONS * POSITIONS; start < newest; start += POSITIONS) {
        int64_t first, last;
        visible_rows(call, task, span, start, s, first, last);
        const int64_t begin = oldest > start ? oldest - start : 0, end = newest - start < POSITIONS ? newest - start : POSITIONS;
        load_tile<T>(call, task, start, begin, end, s);
        score_rows(call, s, first, last);
        for (int64_t row = first; row < last; ++row) soften(call, s, row, padded);
        add_values(s, first, last, padded);
    }
    for (int64_t row = 0; row < rows; ++row) {
        const float scale = 1.0f / s.total[row];
        float* target = call.out + ((query0 + task.query + row / group) * call.heads + task.kv_head * group + row % group) * call.dim;
        for (int64_t d = 0; d < call.dim; ++d) target[d] = s.out[row * padded + d] * scale;
    }
}

// The first sequence whose lengths or blocks are impossible; -1 when all are fine.
inline int64_t find_bad_sequence(const AttentionCall& call, int64_t sequences, int64_t tokens) {
    if (call.query_starts[0] != 0 || call.query_starts[sequences] != tokens) return 0;
    for (int64_t i = 0; i < sequences; ++i) {
        const int64_t queries = (int64_t)call.query_starts[i + 1] - call.query_starts[i], context = call.context_lens[i];
        if (queries < 0 || context < queries || (context + call.block_size - 1) / call.block_size > call.table_stride) return i;
        if (queries == 0) continue;
        const int64_t first_query = context - queries;
        const int64_t oldest = call.window > 0 && first_query >= call.window ? first_query - call.window + 1 : 0;
        for (int64_t b = oldest / call.block_size; b * call.block_size < context; ++b) {
            const int32_t block = call.tables[i * call.table_stride + b];
            if (block < 0 || block >= call.num_blocks) return i;
        }
    }
    return -1;
}

// What there is to do: the last queries of a sequence cost most, so they go first: less waiting at the end. `together`: all heads of a
// sequence with one query are one task, since their keys and values lie side by side.
inline void list_tasks(const AttentionCall& call, int64_t sequences, bool together, std::vector<AttentionTask>& tasks) {
    const int64_t step = GROUP_ROWS / (call.heads / call.kv_heads);
    tasks.clear();
    for (int64_t i = 0; i < sequences; ++i) {
        const int64_t queries = call.query_starts[i + 1] - call.query_starts[i];
        if (queries == 1 && together) {
            tasks.push_back(AttentionTask{(int32_t)i, 0, 0, 1, call.kv_heads});
            continue;
        }
        for (int64_t end = queries; end > 0; end -= step)
            for (int64_t h = 0; h < call.kv_heads; ++h) {
                const int64_t begin = end > step ? end - step : 0;
                tasks.push_back(AttentionTask{(int32_t)i, (int32_t)h, begin, end - begin, 1});
            }
    }
}

}  // namespace tandem
