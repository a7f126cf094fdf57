// The same walk as attention.h over bf16 caches, with the CPU's bf16 dot products: queries and softmax weights are rounded to bf16, sums and
// the softmax itself stay float32.
//
// Keys are brought as pairs of dims, [16 positions' groups][dim / 2][16 positions], values as pairs of positions, [pairs][dim], so that one
// instruction multiplies two. Every score is one chain over pairs of dims, every output element one chain over pairs of the positions
// that the row sees: a row's bits depend on nothing else.
#pragma once

#include "attention.h"

namespace tandem {

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

static inline bool bf16_attention_fits(int64_t dim) { return dim % 32 == 0 && dim <= MAX_DIM; }

struct Bf16Scratch {
    alignas(64) uint32_t keys[POSITIONS / 16][MAX_DIM / 2][16];
    alignas(64) uint32_t values[POSITIONS / 2][MAX_DIM];
    alignas(64) uint32_t q[GROUP_ROWS][MAX_DIM / 2];
    alignas(64) uint32_t weights[GROUP_ROWS][POSITIONS / 2];
    AttentionScratch rows;  // scores, outputs, maxima and totals as there; its keys and values are not used
};

typedef const uint16_t* CachedRow;

// Where positions [begin, end) of the tile at `start` lie: the keys of head `kv_head`; values are `to_values` further on.
inline void find_rows(const AttentionCall& call, const AttentionTask& task, int64_t kv_head, int64_t start, int64_t begin, int64_t end,
                      CachedRow* rows) {
    const int32_t* table = call.tables + task.sequence * call.table_stride;
    int64_t index = (start + begin) / call.block_size, offset = (start + begin) % call.block_size;
    for (int64_t j = begin; j < end; ++index, offset = 0) {
        CachedRow row = (CachedRow)call.cache + table[index] * call.block_stride + (kv_head * call.block_size + offset) * call.dim;
        const int64_t stop = j + call.block_size - offset < end ? j + call.block_size - offset : end;
        for (; j < stop; ++j, row += call.dim) rows[j] = row;
    }
}

// Asks for the keys and values of `rows` a few at a time: a burst would fill the core's miss buffers and hold up the work beside it.
class Prefetcher {
public:
    Prefetcher(const CachedRow* rows, int64_t begin, int64_t end, int64_t dim, int64_t to_values)
        : rows_(rows), at_(begin), end_(end), dim_(dim), to_values_(to_values) {}
    void some(int64_t count) {
        for (const int64_t stop = at_ + count < end_ ? at_ + count : end_; at_ < stop; ++at_)
            for (int64_t d = 0; d < dim_; d += 32) {
                __builtin_prefetch(rows_[at_] + d);
                __builtin_prefetch(rows_[at_] + to_values_ + d);
            }
    }

private:
    const CachedRow* rows_;
    int64_t at_, end_, dim_, to_values_;
};

// Keys and values of positions [begin, end) into scratch; what lies beside them in their groups of 16 and pairs becomes 0.
inline void load_bf16_tile(const CachedRow* rows, int64_t begin, int64_t end, int64_t dim, int64_t to_values, Prefetcher& ahead, Bf16Scratch& s) {
    for (int64_t j0 = begin / 16 * 16; j0 < end; j0 += 16) {
        ahead.some(8);
        const bool whole = j0 >= begin && j0 + 16 <= end;
        for (int64_t d = 0; d < dim; d += 32) {
            vf square[16];
            if (whole) {
#pragma GCC unroll 16
                for (int64_t j = 0; j < 16; ++j) square[j] = (vf)_mm512_loadu_ps((const void*)(rows[j0 + j] + d));
            } else {
                for (int64_t j = 0; j < 16; ++j) {
                    const bool there = j0 + j >= begin && j0 + j < end;
                    square[j] = there ? (vf)_mm512_loadu_ps((const void*)(rows[j0 + j] + d)) : splat(0.0f);
                }
            }
            transpose(square);
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i) _mm512_store_ps((void*)s.keys[j0 / 16][d / 2 + i], (__m512)square[i]);
        }
    }
    // Words 0, 32, 1, 33, ... and 16, 48, 17, 49, ...: a row's and the next one's, side by side.
    alignas(64) static const uint16_t first[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                   8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(first), high = _mm512_add_epi16(low, _mm512_set1_epi16(16)), none = _mm512_setzero_si512();
    for (int64_t j = begin / 2 * 2; j < end; j += 2) {
        if (j % 16 == 0) ahead.some(4);
        for (int64_t d = 0; d < dim; d += 32) {
            const __m512i a = j >= begin ? _mm512_loadu_si512(rows[j] + to_values + d) : none;
            const __m512i b = j + 1 < end ? _mm512_loadu_si512(rows[j + 1] + to_values + d) : none;
            _mm512_store_si512(s.values[j / 2] + d, _mm512_permutex2var_epi16(a, low, b));
            _mm512_store_si512(s.values[j / 2] + d + 16, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

// c[r][16 * v + lane] (+)= sum over i < count of the pairs x[r][i] . w[v * vector_stride + i * stride + lane].
template <int ROWS>
inline void pairs_tile(const uint32_t* x, int64_t x_stride, const uint32_t* w, int64_t stride, int64_t vector_stride, int64_t count, float* c,
                       int64_t c_stride, bool first) {
    __m512 sum[ROWS][4];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < 4; ++v) sum[r][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * c_stride + v * 16);
    for (int64_t i = 0; i < count; ++i) {
        __m512bh b[4];
        for (int v = 0; v < 4; ++v) b[v] = (__m512bh)_mm512_load_si512(w + v * vector_stride + i * stride);
        for (int r = 0; r < ROWS; ++r) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32((int32_t)x[r * x_stride + i]);
            for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], a, b[v]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < 4; ++v) _mm512_storeu_ps(c + r * c_stride + v * 16, sum[r][v]);
}

inline void pairs_rows(int64_t rows, const uint32_t* x, int64_t xs, const uint32_t* w, int64_t ws, int64_t vs, int64_t n, float* c, int64_t cs,
                       bool first) {
    switch (rows) {
        case 1: return pairs_tile<1>(x, xs, w, ws, vs, n, c, cs, first);
        case 2: return pairs_tile<2>(x, xs, w, ws, vs, n, c, cs, first);
        case 3: return pairs_tile<3>(x, xs, w, ws, vs, n, c, cs, first);
        case 4: return pairs_tile<4>(x, xs, w, ws, vs, n, c, cs, first);
        case 5: return pairs_tile<5>(x, xs, w, ws, vs, n, c, cs, first);
        default: return pairs_tile<6>(x, xs, w, ws, vs, n, c, cs, first);
    }
}

inline void round_queries(const AttentionCall& call, const AttentionTask& task, int64_t query0, int64_t group, Bf16Scratch& s) {
    const int64_t width = task.kv_heads * group;  // rows of a query
    for (int64_t row = 0; row < task.count * width; ++row) {
        const float* q = call.q + ((query0 + task.query + row / width) * call.heads + task.kv_head * group + row % width) * call.dim;
        for (int64_t d = 0; d < call.dim; d += 32)
            _mm512_store_si512(s.q[row] + d / 2, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(q + d + 16), _mm512_loadu_ps(q + d)));
    }
}

inline void score_bf16_rows(int64_t dim, Bf16Scratch& s, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += MAX_ROWS) {
        const int64_t count = last - row < MAX_ROWS ? last - row : MAX_ROWS;
        pairs_rows(count, s.q[row], MAX_DIM / 2, s.keys[0][0], 16, MAX_DIM / 2 * 16, dim / 2, s.rows.scores + row * POSITIONS, POSITIONS, true);
    }
}

// 2^x for x <= 0, relative error under 1e-5: the results are rounded to bf16. Underflows to 0.
static inline __m512 exp2_roughly(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(9.6181291e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// `soften` of attention.h in powers of 2, its weights rounded to pairs of bf16.
inline void soften_bf16(const AttentionCall& call, Bf16Scratch& s, int64_t row, int64_t dim) {
    const float* scores = s.rows.scores + row * POSITIONS;
    const uint64_t all = ~(uint64_t)0;
    const uint64_t seen = (all << s.rows.begin[row]) & (all >> (POSITIONS - s.rows.end[row]));
    const __m512 unit = _mm512_set1_ps(call.scale * 1.44269504088896341f), none = _mm512_set1_ps(-INFINITY);
    __m512 value[4];
    for (int v = 0; v < 4; ++v) value[v] = _mm512_mask_mul_ps(none, (__mmask16)(seen >> 16 * v), _mm512_load_ps(scores + 16 * v), unit);
    const float best = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(value[0], value[1]), _mm512_max_ps(value[2], value[3])));
    const float before = s.rows.highest[row], now = best > before ? best : before;
    for (int v = 0; v < 4; ++v) value[v] = _mm512_maskz_mov_ps((__mmask16)(seen >> 16 * v), exp2_roughly(_mm512_sub_ps(value[v], _mm512_set1_ps(now))));
    const float total = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(value[0], value[1]), _mm512_add_ps(value[2], value[3])));
    _mm512_store_si512(s.weights[row], (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]));
    _mm512_store_si512(s.weights[row] + 16, (__m512i)_mm512_cvtne2ps_pbh(value[3], value[2]));
    s.rows.highest[row] = now;
    if (now == before) {
        s.rows.total[row] = s.rows.total[row] + total;
        return;
    }
    const __m512 shrink = exp2_roughly(_mm512_set1_ps(before == -INFINITY ? -200.0f : before - now));
    s.rows.total[row] = s.rows.total[row] * _mm512_cvtss_f32(shrink) + total;
    float* out = s.rows.out + row * dim;
    for (int64_t d = 0; d < dim; d += 16) _mm512_store_ps(out + d, _mm512_mul_ps(_mm512_load_ps(out + d), shrink));
}

// One half of a pair of values made 0 for its life time: a row that sees the other position only has a weight of 0 there, and 0 times an
// infinity would be NaN.
class HalfPair {
public:
    HalfPair(uint32_t* values, int64_t dim, uint32_t keep, bool needed) : values_(values), bytes_(needed ? (size_t)dim * 4 : 0) {
        std::memcpy(saved_, values_, bytes_);
        for (size_t d = 0; d < bytes_ / 4; ++d) values_[d] &= keep;
    }
    ~HalfPair() { std::memcpy(values_, saved_, bytes_); }
    HalfPair(const HalfPair&) = delete;
    HalfPair& operator=(const HalfPair&) = delete;

private:
    uint32_t saved_[MAX_DIM];
    uint32_t* values_;
    size_t bytes_;
};

inline void add_bf16_values(int64_t dim, Bf16Scratch& s, int64_t first, int64_t last) {
    for (int64_t row = first; row < last;) {
        int64_t count = 1;
        const int64_t seen = s.rows.begin[row], stop = s.rows.end[row], begin = seen / 2, end = (stop + 1) / 2;
        while (count < MAX_ROWS && row + count < last && s.rows.begin[row + count] == seen && s.rows.end[row + count] == stop) ++count;
        const HalfPair oldest(s.values[begin], dim, 0xFFFF0000u, seen % 2 == 1), newest(s.values[end - 1], dim, 0x0000FFFFu, stop % 2 == 1);
        int64_t d = 0;
        for (; d + 64 <= dim; d += 64)
            pairs_rows(count, s.weights[row] + begin, POSITIONS / 2, s.values[begin] + d, MAX_DIM, 16, end - begin, s.rows.out + row * dim + d, dim, false);
        for (; d < dim; d += 32)  // a half tile: its upper vectors read what lies behind and are thrown away
            for (int64_t r = 0; r < count; ++r) {
                alignas(64) float c[64] = {};
                std::memcpy(c, s.rows.out + (row + r) * dim + d, 32 * 4);
                pairs_rows(1, s.weights[row + r] + begin, POSITIONS / 2, s.values[begin] + d, MAX_DIM, 16, end - begin, c, 64, false);
                std::memcpy(s.rows.out + (row + r) * dim + d, c, 32 * 4);
            }
        row += count;
    }
}

// The heads of a task one after another, tile by tile: what comes next is prefetched while one is worked on.
struct TileWalk {
    const AttentionCall& call;
    const AttentionTask& task;
    int64_t oldest, newest;  // positions that any row sees: [oldest, newest)
    int64_t start, head;     // of the current tile, relative to task.kv_head

    TileWalk& operator=(const TileWalk& other) {
        start = other.start, head = other.head;
        return *this;
    }
    TileWalk(const TileWalk&) = default;
    TileWalk(const AttentionCall& c, const AttentionTask& t, int64_t first_query) : call(c), task(t), head(0) {
        oldest = c.window > 0 && first_query >= c.window ? first_query - c.window + 1 : 0;
        newest = first_query + t.count;
        start = oldest / POSITIONS * POSITIONS;
    }
    bool done() const { return start >= newest; }
    int64_t begin() const { return oldest > start ? oldest - start : 0; }
    int64_t end() const { return newest - start < POSITIONS ? newest - start : (int64_t)POSITIONS; }
    void advance() {
        if (++head == task.kv_heads) head = 0, start += POSITIONS;
    }
    void rows(CachedRow* out) const { find_rows(call, task, task.kv_head + head, start, begin(), end(), out); }
};

inline void run_bf16_task(const AttentionCall& call, const AttentionTask& task) {
    Bf16Scratch s;
    const int64_t query0 = call.query_starts[task.sequence], queries = call.query_starts[task.sequence + 1] - query0;
    const int64_t group = call.heads / call.kv_heads, width = task.kv_heads * group, rows = task.count * width, dim = call.dim;
    const int64_t context = call.context_lens[task.sequence], to_values = call.kv_heads * call.block_size * dim;
    const Span span{context, context - queries + task.query, group};
    round_queries(call, task, query0, group, s);
    std::memset(s.rows.out, 0, (size_t)(rows * dim) * 4);
    for (int64_t row = 0; row < rows; ++row) s.rows.highest[row] = -INFINITY, s.rows.total[row] = 0.0f;
    CachedRow cached[2][POSITIONS];
    TileWalk now(call, task, span.first_query);
    now.rows(cached[0]);
    for (int which = 0; !now.done(); which ^= 1) {
        TileWalk next = now;
        next.advance();
        if (!next.done()) next.rows(cached[which ^ 1]);
        Prefetcher ahead(cached[which ^ 1], next.done() ? 0 : next.begin(), next.done() ? 0 : next.end(), dim, to_values);
        load_bf16_tile(cached[which], now.begin(), now.end(), dim, to_values, ahead, s);
        // With several heads there is one query, and the head's rows all see the tile alike.
        int64_t first = now.head * group, last = first + group;
        if (task.kv_heads == 1)
            visible_rows(call, task, span, now.start, s.rows, first, last);
        else
            for (int64_t row = first; row < last; ++row) s.rows.begin[row] = now.begin(), s.rows.end[row] = now.end();
        score_bf16_rows(dim, s, first, last);
        for (int64_t row = first; row < last; ++row) {
            ahead.some(8);
            soften_bf16(call, s, row, dim);
        }
        ahead.some(POSITIONS);
        add_bf16_values(dim, s, first, last);
        now = next;
    }
    for (int64_t row = 0; row < rows; ++row) {
        const float scale = 1.0f / s.rows.total[row];
        float* target = call.out + ((query0 + task.query + row / width) * call.heads + task.kv_head * group + row % width) * dim;
        for (int64_t d = 0; d < dim; ++d) target[d] = s.rows.out[row * dim + d] * scale;
    }
}

#else

static inline bool bf16_attention_fits(int64_t) { return false; }
inline void run_bf16_task(const AttentionCall&, const AttentionTask&) {}

#endif

// One task, `rounded` where asked for and possible. That depends on the call's shape and the machine only.
inline void attend(const AttentionCall& call, const AttentionTask& task, bool is_bf16, bool rounded) {
    if (is_bf16 && rounded && bf16_attention_fits(call.dim))
        run_bf16_task(call, task);
    else if (is_bf16)
        run_task<uint16_t>(call, task);
    else
        run_task<float>(call, task);
}

}  // namespace tandem
