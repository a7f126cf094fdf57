// The same walk as attention.h over caches of bf16 and of 8-bit codes, with the CPU's bf16 dot products: queries and softmax weights are rounded to bf16, sums and
// the softmax itself stay float32.
//
// Keys are taken as pairs of dims of 16 positions side by side, values as pairs of positions, so that one instruction multiplies two. A
// cache in paired order lies like that and is read in place; from one in plain order each tile is brought into scratch, and so are codes,
// which bf16 holds exactly: their positions' scales multiply scores and weights, not elements. Every score is one
// chain over pairs of dims, every output element one chain over pairs of the positions that the row sees: a row's bits depend on nothing
// else, the order included.
#pragma once

#include <optional>

#include "bf16_amx.h"
#include "bf16_softmax.h"
#include "bf16_tile.h"

namespace tandem {

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

static inline bool bf16_attention_fits(int64_t dim) { return dim % 32 == 0 && dim <= MAX_DIM; }

// Vector v of step i of a chain: over dims for scores, over positions for outputs.
struct KeyVectors {
    const Bf16Tile& tile;
    const uint32_t* operator()(int64_t i, int v) const { return tile.keys[v] + i * tile.stride; }
};

struct ValueVectors {
    const uint32_t* const* pairs;
    int64_t column;
    const uint32_t* operator()(int64_t i, int v) const { return pairs[i] + column + v * 16; }
};

// c[r][16 * v + lane] (+)= sum over i < count of the pairs x[r][i] . w(i, v)[lane]. `ahead`, unless null, is asked for meanwhile:
// into the second level of cache, of which more requests can be under way than of the first.
template <int ROWS, int VECTORS, class Vectors>
inline void pairs_tile(const uint32_t* x, int64_t x_stride, const Vectors& w, const Vectors* ahead, int64_t count, float* c, int64_t c_stride,
                       bool first) {
    __m512 sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * c_stride + v * 16);
    for (int64_t i = 0; i < count; ++i) {
        __m512bh b[VECTORS];
        for (int v = 0; v < VECTORS; ++v) b[v] = (__m512bh)_mm512_loadu_si512(w(i, v));
        if (ahead)
            for (int v = 0; v < VECTORS; ++v) __builtin_prefetch((*ahead)(i, v), 0, 2);
        for (int r = 0; r < ROWS; ++r) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32((int32_t)x[r * x_stride + i]);
            for (int v = 0; v < VECTORS; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], a, b[v]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(c + r * c_stride + v * 16, sum[r][v]);
}

template <int VECTORS, class Vectors>
inline void pairs_rows(int64_t rows, const uint32_t* x, int64_t xs, const Vectors& w, const Vectors* ahead, int64_t n, float* c, int64_t cs,
                       bool first) {
    switch (rows) {
        case 1: return pairs_tile<1, VECTORS>(x, xs, w, ahead, n, c, cs, first);
        case 2: return pairs_tile<2, VECTORS>(x, xs, w, ahead, n, c, cs, first);
        case 3: return pairs_tile<3, VECTORS>(x, xs, w, ahead, n, c, cs, first);
        case 4: return pairs_tile<4, VECTORS>(x, xs, w, ahead, n, c, cs, first);
        case 5: return pairs_tile<5, VECTORS>(x, xs, w, ahead, n, c, cs, first);
        default: return pairs_tile<6, VECTORS>(x, xs, w, ahead, n, c, cs, first);
    }
}

inline void round_queries(const AttentionCall& call, const AttentionTask& task, int64_t query0, int64_t group, Bf16Scratch& s) {
    const int64_t width = task.kv_heads * group;  // rows of a query
    for (int64_t row = 0; row < task.count * width; ++row) {
        const float* q = call.q + ((query0 + task.query + row / width) * call.heads + task.kv_head * group + row % width) * call.dim;
        for (int64_t d = 0; d < call.dim; d += 32)
            _mm512_store_si512(s.queries + (row * call.dim + d) / 2, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(q + d + 16), _mm512_loadu_ps(q + d)));
    }
}

inline void score_bf16_rows(int64_t dim, const Bf16Tile& tile, const Bf16Tile* next, Bf16Scratch& s, int64_t first, int64_t last) {
    const KeyVectors keys{tile}, ahead{next ? *next : tile};
    for (int64_t row = first; row < last; row += MAX_ROWS) {
        const int64_t count = last - row < MAX_ROWS ? last - row : MAX_ROWS;
        pairs_rows<4>(count, s.queries + row * dim / 2, dim / 2, keys, next && row == first ? &ahead : nullptr, dim / 2, s.scores + row * POSITIONS, POSITIONS,
                      true);
    }
}

// Puts a copy of pair `at` that keeps only `keep` in its place for its life time: a row that sees the other position only has a weight of 0
// there, and 0 times an infinity would be NaN.
class HalfPair {
public:
    HalfPair(Bf16Tile& tile, int64_t at, int64_t dim, uint32_t keep, bool needed, uint32_t* copy) : place_(tile.values[at]), saved_(place_) {
        if (!needed) return;
        for (int64_t d = 0; d < dim; ++d) copy[d] = saved_[d] & keep;
        place_ = copy;
    }
    ~HalfPair() { place_ = saved_; }
    HalfPair(const HalfPair&) = delete;
    HalfPair& operator=(const HalfPair&) = delete;

private:
    const uint32_t*& place_;
    const uint32_t* saved_;
};

inline void add_bf16_values(int64_t dim, Bf16Tile& tile, const Bf16Tile* next, Bf16Scratch& s, int64_t first, int64_t last) {
    for (int64_t row = first; row < last;) {
        int64_t count = 1;
        const int64_t seen = s.begin[row], stop = s.end[row], begin = seen / 2, end = (stop + 1) / 2;
        while (count < MAX_ROWS && row + count < last && s.begin[row + count] == seen && s.end[row + count] == stop) ++count;
        const HalfPair oldest(tile, begin, dim, 0xFFFF0000u, seen % 2 == 1, s.edges[0]);
        const HalfPair newest(tile, end - 1, dim, 0x0000FFFFu, stop % 2 == 1, s.edges[1]);
        const uint32_t* weights = s.weights[row] + begin;
        float* out = s.out + row * dim;
        const auto columns = [&](auto vectors, int64_t d) {
            constexpr int VECTORS = decltype(vectors)::value;
            const ValueVectors values{tile.values + begin, d}, ahead{next ? next->values + begin : nullptr, d};
            pairs_rows<VECTORS>(count, weights, POSITIONS / 2, values, next && row == first ? &ahead : nullptr, end - begin, out + d, dim, false);
        };
        int64_t d = 0;
        for (; d + 64 <= dim; d += 64) columns(std::integral_constant<int, 4>(), d);
        if (d < dim) columns(std::integral_constant<int, 2>(), d);
        row += count;
    }
}

// The same by vectors; what comes next is asked for meanwhile.
inline void attend_by_vectors(const AttentionCall& call, TileStep& step, const TileStep* next, Bf16Scratch& s) {
    const int64_t group = (step.last - step.first) / step.heads;
    for (int64_t h = 0; h < step.heads; ++h) {
        const int64_t first = step.first + h * group, last = first + group;
        const Bf16Tile* ahead = next && h < next->heads ? &next->tiles[h] : nullptr;
        score_bf16_rows(call.dim, step.tiles[h], ahead, s, first, last);
        soften_bf16_rows(call, s, first, last, call.dim);
        add_bf16_values(call.dim, step.tiles[h], ahead, s, first, last);
    }
}

inline void run_bf16_task(const AttentionCall& call, const AttentionTask& task) {
    Bf16Scratch s;
    const int64_t query0 = call.query_starts[task.sequence], queries = call.query_starts[task.sequence + 1] - query0;
    const int64_t group = call.heads / call.kv_heads, width = task.kv_heads * group, rows = task.count * width, dim = call.dim;
    const int64_t context = call.context_lens[task.sequence];
    const Span span{context, context - queries + task.query, group};
    round_queries(call, task, query0, group, s);
    std::memset(s.out, 0, (size_t)(rows * dim) * 4);
    for (int64_t row = 0; row < rows; ++row) s.highest[row] = -INFINITY, s.total[row] = 0.0f;
#if TANDEM_TILES
    std::optional<AttentionTiles> amx;
    if (Tiles::used()) amx.emplace(task.kv_heads == 1 ? rows : group);
#endif
    TileWalk walk(call, task);
    const bool in_place = call.paired && call.format == KV_BF16;
    TileStep steps[2];
    bool found = false;
    for (int which = 0; found || !walk.done(); which ^= 1) {
        TileStep &step = steps[which], *next = nullptr;
        if (!found) step = next_step(walk, s, in_place, group);
        found = false;
        if (task.kv_heads == 1)
            visible_rows(call, task, span, step.start, s, step.first, step.last);
        else  // there is one query, and the heads' rows all see the tile alike
            for (int64_t row = step.first; row < step.last; ++row) s.begin[row] = step.begin, s.end[row] = step.end;
        if (in_place && !walk.done()) *(next = &steps[which ^ 1]) = next_step(walk, s, in_place, group), found = true;
        if (call.scales && call.paired && !walk.done()) ask_for_codes(walk);
#if TANDEM_TILES
        if (amx) {
            for (int64_t h = 0; next && h < next->heads; ++h) ask_for(next->tiles[h], dim);
            step.heads == 1 ? attend_head(call, *amx, step, s) : attend_heads(call, *amx, step, s);
            continue;
        }
#endif
        attend_by_vectors(call, step, next, s);
    }
    for (int64_t row = 0; row < rows; ++row) {
        const float scale = 1.0f / s.total[row];
        float* target = call.out + ((query0 + task.query + row / width) * call.heads + task.kv_head * group + row % width) * dim;
        for (int64_t d = 0; d < dim; ++d) target[d] = s.out[row * dim + d] * scale;
    }
}

#else

static inline bool bf16_attention_fits(int64_t) { return false; }
inline void run_bf16_task(const AttentionCall&, const AttentionTask&) {}

#endif

// One task, `rounded` where asked for and possible. That depends on the call's shape and the machine only.
inline void attend(const AttentionCall& call, const AttentionTask& task, bool rounded) {
    if (call.format != KV_FLOAT32 && rounded && bf16_attention_fits(call.dim))
        run_bf16_task(call, task);
    else
        with_format(call.format, [&](auto element) { run_task<decltype(element)>(call, task); });
}

}  // namespace tandem
