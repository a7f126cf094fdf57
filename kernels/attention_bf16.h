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

#include "attention.h"
#include "kv_order.h"
#include "tiles.h"

namespace tandem {

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

static inline bool bf16_attention_fits(int64_t dim) { return dim % 32 == 0 && dim <= MAX_DIM; }

struct Bf16Scratch : AttentionRows {
    alignas(64) uint32_t keys[POSITIONS / 16][MAX_DIM / 2][16];  // of a tile in plain order, as are the values
    alignas(64) uint32_t values[POSITIONS / 2][MAX_DIM];
    alignas(64) uint32_t edges[2][MAX_DIM];  // pairs of which a row must not see one half
    // Whole tiles of rows are read.
    alignas(64) uint32_t q[GROUP_ROWS + 15][MAX_DIM / 2];
    alignas(64) uint32_t weights[GROUP_ROWS + 15][POSITIONS / 2];
    alignas(64) uint32_t seen[2][8][MAX_DIM];  // groups of positions at the ends of what rows see
    alignas(64) uint16_t decoded[2][POSITIONS][MAX_DIM];  // keys and values of codes in plain order
    alignas(64) float key_scales[POSITIONS], value_scales[POSITIONS];  // of codes, of the current tile
};

// Where the pairs of one head's tile lie. What no row sees points to something that may be read.
struct Bf16Tile {
    const uint32_t* keys[POSITIONS / 16];   // 16 positions each: vector i holds pair i of their dims
    const uint32_t* values[POSITIONS / 2];  // [dim] pairs
    int64_t stride;                         // between vectors of keys
};

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

// The heads of a task one after another, tile by tile.
struct TileWalk {
    const AttentionCall& call;
    const AttentionTask& task;
    int64_t oldest, newest;  // positions that any row sees: [oldest, newest)
    int64_t start, head;     // of the current tile, relative to task.kv_head

    TileWalk(const AttentionCall& c, const AttentionTask& t) : call(c), task(t), head(0) {
        const int64_t first_query = c.context_lens[t.sequence] - (c.query_starts[t.sequence + 1] - c.query_starts[t.sequence]) + t.query;
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
    // The current head's keys in the block that holds a position, and where in the block that is.
    template <class T>
    const T* block_of(int64_t position, int64_t& offset) const {
        const int32_t block = call.tables[task.sequence * call.table_stride + position / call.block_size];
        offset = position % call.block_size;
        return (const T*)call.cache + block * call.block_stride + (task.kv_head + head) * call.block_size * call.dim;
    }
};

// A tile of a cache in paired order: where it is.
inline void find_tile(const TileWalk& walk, Bf16Tile& tile) {
    const AttentionCall& call = walk.call;
    const int64_t to_values = call.kv_heads * call.block_size * call.dim, first = walk.begin() / 16, last = (walk.end() + 15) / 16;
    tile.stride = call.block_size;
    for (int64_t group = first; group < last; ++group) {
        int64_t offset;
        const uint16_t* keys = walk.block_of<uint16_t>(walk.start + group * 16, offset);
        tile.keys[group] = (const uint32_t*)keys + offset;
        const uint32_t* values = (const uint32_t*)(keys + to_values) + offset / 2 * call.dim;
        for (int64_t pair = 0; pair < 8; ++pair) tile.values[group * 8 + pair] = values + pair * call.dim;
    }
    for (int64_t group = 0; group < POSITIONS / 16; ++group) {
        if (group >= first && group < last) continue;
        tile.keys[group] = tile.keys[first];
        for (int64_t pair = 0; pair < 8; ++pair) tile.values[group * 8 + pair] = tile.values[first * 8];
    }
}

// 32 codes as bf16, which holds each exactly: those of e4m3 divided by 256.
static inline __m512i decode32(const int8_t* p) {
    const __m256i codes = _mm256_loadu_si256((const __m256i*)p);
    return (__m512i)_mm512_cvtne2ps_pbh(decode16(_mm256_extracti128_si256(codes, 1), int8_t()), decode16(_mm256_castsi256_si128(codes), int8_t()));
}
static inline __m512i decode32(const E4m3* p) {
    const __m256i codes = _mm256_loadu_si256((const __m256i*)p);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtph_ps(e4m3_halves(_mm256_extracti128_si256(codes, 1))),
                                        _mm512_cvtph_ps(e4m3_halves(_mm256_castsi256_si128(codes))));
}

// Where the keys and values of positions [begin, end) of a tile in plain order are, as bf16.
struct Bf16Rows {
    const uint16_t *keys[POSITIONS], *values[POSITIONS];
};

template <class T>
inline void find_rows(const TileWalk& walk, Bf16Scratch& s, Bf16Rows& rows) {
    const int64_t dim = walk.call.dim, to_values = walk.call.kv_heads * walk.call.block_size * dim;
    for (int64_t j = walk.begin(); j < walk.end(); ++j) {
        int64_t offset;
        const T* keys = walk.block_of<T>(walk.start + j, offset);
        keys += offset * dim;
        if constexpr (HAS_SCALES<T>) {
            for (int64_t d = 0; d < dim; d += 32) {
                _mm512_store_si512(s.decoded[0][j] + d, decode32(keys + d));
                _mm512_store_si512(s.decoded[1][j] + d, decode32(keys + to_values + d));
            }
            rows.keys[j] = s.decoded[0][j], rows.values[j] = s.decoded[1][j];
        } else {
            rows.keys[j] = (const uint16_t*)keys, rows.values[j] = (const uint16_t*)(keys + to_values);
        }
    }
}

// The scales of a tile's positions, with what its codes were divided by.
inline void load_scales(const TileWalk& walk, Bf16Scratch& s) {
    const float unit = walk.call.format == KV_E4M3 ? 256.0f : 1.0f;
    each_scale(walk.call, walk.task.sequence, walk.task.kv_head + walk.head, walk.start, walk.begin(), walk.end(),
               [&](int64_t j, float key, float value) { s.key_scales[j] = key * unit, s.value_scales[j] = value * unit; });
}

// A tile of codes in paired order, brought into scratch as it lies. Whole groups of 16 positions are decoded: every code is a number.
template <class T>
inline void load_paired_codes(const TileWalk& walk, Bf16Scratch& s) {
    const AttentionCall& call = walk.call;
    const int64_t dim = call.dim, size = call.block_size, to_values = call.kv_heads * size * dim;
    for (int64_t group = walk.begin() / 16; group < (walk.end() + 15) / 16; ++group) {
        int64_t offset;
        const T* head = walk.block_of<T>(walk.start + group * 16, offset);
        const T *keys = head + offset * 2, *values = head + to_values + offset * dim;
        for (int64_t i = 0; i < dim / 2; ++i) _mm512_store_si512(s.keys[group][i], decode32(keys + i * 2 * size));
        for (int64_t pair = 0; pair < 8; ++pair)
            for (int64_t d = 0; d < dim; d += 16) _mm512_store_si512(s.values[group * 8 + pair] + d, decode32(values + pair * 2 * dim + 2 * d));
    }
}

// The current tile of codes in paired order, asked for before it is loaded: into the second level of cache.
inline void ask_for_codes(const TileWalk& walk) {
    const int64_t dim = walk.call.dim, size = walk.call.block_size, to_values = walk.call.kv_heads * size * dim;
    for (int64_t group = walk.begin() / 16; group < (walk.end() + 15) / 16; ++group) {
        int64_t offset;
        const int8_t* head = walk.block_of<int8_t>(walk.start + group * 16, offset);
        for (int64_t i = 0; i < dim / 2; i += size == 16 ? 2 : 1) __builtin_prefetch(head + offset * 2 + i * 2 * size, 0, 2);
        for (int64_t at = 0; at < 16 * dim; at += 64) __builtin_prefetch(head + to_values + offset * dim + at, 0, 2);
    }
}

// A tile of a cache in plain order, brought into scratch; what lies beside its positions in their groups of 16 and pairs becomes 0.
template <class T>
inline void load_plain(const TileWalk& walk, Bf16Scratch& s) {
    const int64_t begin = walk.begin(), end = walk.end(), dim = walk.call.dim;
    Bf16Rows rows;
    find_rows<T>(walk, s, rows);
    for (int64_t j0 = begin / 16 * 16; j0 < end; j0 += 16)
        for (int64_t d = 0; d < dim; d += 32) {
            vf square[16];
            for (int64_t j = 0; j < 16; ++j)
                square[j] = j0 + j >= begin && j0 + j < end ? (vf)_mm512_loadu_ps((const void*)(rows.keys[j0 + j] + d)) : splat(0.0f);
            transpose(square);
            for (int64_t i = 0; i < 16; ++i) _mm512_store_ps((void*)s.keys[j0 / 16][d / 2 + i], (__m512)square[i]);
        }
    for (int64_t j = begin / 2 * 2; j < end; j += 2)
        for (int64_t d = 0; d < dim; d += 32) {
            const __m512i none = _mm512_setzero_si512();
            const __m512i a = j >= begin ? _mm512_loadu_si512(rows.values[j] + d) : none;
            const __m512i b = j + 1 < end ? _mm512_loadu_si512(rows.values[j + 1] + d) : none;
            _mm512_store_si512(s.values[j / 2] + d, pairs_low(a, b));
            _mm512_store_si512(s.values[j / 2] + d + 16, pairs_high(a, b));
        }
}

// The current tile by way of scratch: of any cache but those in paired order that hold bf16.
inline void load_tile(const TileWalk& walk, Bf16Scratch& s, Bf16Tile& tile) {
    with_format(walk.call.format, [&](auto element) {
        using T = decltype(element);
        if constexpr (sizeof(T) == 4) return;  // floats are not for here
        if constexpr (HAS_SCALES<T>) {
            load_scales(walk, s);
            if (walk.call.paired) return load_paired_codes<T>(walk, s);
        }
        if constexpr (sizeof(T) < 4) load_plain<T>(walk, s);
    });
    tile.stride = 16;
    for (int64_t group = 0; group < POSITIONS / 16; ++group) tile.keys[group] = s.keys[group][0];
    for (int64_t pair = 0; pair < POSITIONS / 2; ++pair) tile.values[pair] = s.values[pair];
}

inline void round_queries(const AttentionCall& call, const AttentionTask& task, int64_t query0, int64_t group, Bf16Scratch& s) {
    const int64_t width = task.kv_heads * group;  // rows of a query
    for (int64_t row = 0; row < task.count * width; ++row) {
        const float* q = call.q + ((query0 + task.query + row / width) * call.heads + task.kv_head * group + row % width) * call.dim;
        for (int64_t d = 0; d < call.dim; d += 32)
            _mm512_store_si512(s.q[row] + d / 2, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(q + d + 16), _mm512_loadu_ps(q + d)));
    }
}

inline void score_bf16_rows(int64_t dim, const Bf16Tile& tile, const Bf16Tile* next, Bf16Scratch& s, int64_t first, int64_t last) {
    const KeyVectors keys{tile}, ahead{next ? *next : tile};
    for (int64_t row = first; row < last; row += MAX_ROWS) {
        const int64_t count = last - row < MAX_ROWS ? last - row : MAX_ROWS;
        pairs_rows<4>(count, s.q[row], MAX_DIM / 2, keys, next && row == first ? &ahead : nullptr, dim / 2, s.scores + row * POSITIONS, POSITIONS,
                      true);
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
    const float* scores = s.scores + row * POSITIONS;
    const uint64_t all = ~(uint64_t)0;
    const uint64_t seen = (all << s.begin[row]) & (all >> (POSITIONS - s.end[row]));
    const __m512 unit = _mm512_set1_ps(call.scale * 1.44269504088896341f), none = _mm512_set1_ps(-INFINITY);
    __m512 value[4];
    for (int v = 0; v < 4; ++v) {
        const __m512 by = call.scales ? _mm512_mul_ps(unit, _mm512_load_ps(s.key_scales + 16 * v)) : unit;
        value[v] = _mm512_mask_mul_ps(none, (__mmask16)(seen >> 16 * v), _mm512_load_ps(scores + 16 * v), by);
    }
    const float best = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(value[0], value[1]), _mm512_max_ps(value[2], value[3])));
    const float before = s.highest[row], now = best > before ? best : before;
    for (int v = 0; v < 4; ++v) value[v] = _mm512_maskz_mov_ps((__mmask16)(seen >> 16 * v), exp2_roughly(_mm512_sub_ps(value[v], _mm512_set1_ps(now))));
    const float total = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(value[0], value[1]), _mm512_add_ps(value[2], value[3])));
    if (call.scales)
        for (int v = 0; v < 4; ++v) value[v] = _mm512_maskz_mul_ps((__mmask16)(seen >> 16 * v), value[v], _mm512_load_ps(s.value_scales + 16 * v));
    _mm512_store_si512(s.weights[row], (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]));
    _mm512_store_si512(s.weights[row] + 16, (__m512i)_mm512_cvtne2ps_pbh(value[3], value[2]));
    s.highest[row] = now;
    if (now == before) {
        s.total[row] = s.total[row] + total;
        return;
    }
    const __m512 shrink = exp2_roughly(_mm512_set1_ps(before == -INFINITY ? -200.0f : before - now));
    s.total[row] = s.total[row] * _mm512_cvtss_f32(shrink) + total;
    float* out = s.out + row * dim;
    for (int64_t d = 0; d < dim; d += 16) _mm512_store_ps(out + d, _mm512_mul_ps(_mm512_load_ps(out + d), shrink));
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

#if TANDEM_TILES

// The products of a task by AMX tiles, where the CPU has them. Sums are chains over 32 dims, or 16 positions, a step: free of the rows
// beside a row, but not the bits of `pairs_tile`. Tiles 0 to 3: sums of four vectors; 4, 5: queries and weights; 6, 7: keys and values.
class AttentionTiles {
public:
    // For up to `rows` rows of a head at a time.
    explicit AttentionTiles(int64_t rows) : hold_(shapes(rows < TILE_ROWS ? rows : (int64_t)TILE_ROWS)) {}

    // Scores of rows [first, last); those of up to 15 rows behind them are written too.
    static void score(int64_t dim, const Bf16Tile& tile, Bf16Scratch& s, int64_t first, int64_t last) {
        TileHold::fence();
        for (int64_t row = first; row < last; row += TILE_ROWS) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t i = 0; i < dim / 2; i += 16) {
                const int64_t at = i * tile.stride, stride = tile.stride * 4;
                _tile_loadd(4, s.q[row] + i, MAX_DIM / 2 * 4);
                _tile_loadd(6, tile.keys[0] + at, stride);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(6, tile.keys[1] + at, stride);
                _tile_dpbf16ps(1, 4, 6);
                _tile_loadd(6, tile.keys[2] + at, stride);
                _tile_dpbf16ps(2, 4, 6);
                _tile_loadd(6, tile.keys[3] + at, stride);
                _tile_dpbf16ps(3, 4, 6);
            }
            float* to = s.scores + row * POSITIONS;
            _tile_stored(0, to, POSITIONS * 4);
            _tile_stored(1, to + 16, POSITIONS * 4);
            _tile_stored(2, to + 32, POSITIONS * 4);
            _tile_stored(3, to + 48, POSITIONS * 4);
        }
        TileHold::fence();
    }

    // out += weights . values of the positions [begin, end) of the tile. A row's weight of what it doesn't see is 0; where there are NaNs
    // or infinities that not all rows see, rows go one by one.
    static void add_values(int64_t dim, const Bf16Tile& tile, Bf16Scratch& s, int64_t first, int64_t last, int64_t begin, int64_t end) {
        const uint32_t* from[POSITIONS / 16];
        int64_t stride[POSITIONS / 16];
        const int64_t first_group = begin / 16, last_group = (end + 15) / 16;
        for (int64_t g = first_group; g < last_group; ++g) {
            const bool whole = begin <= g * 16 && g * 16 + 16 <= end;
            from[g] = whole ? tile.values[g * 8] : seen_only(dim, tile, s, g, begin, end);
            stride[g] = whole ? (tile.values[g * 8 + 1] - tile.values[g * 8]) * 4 : MAX_DIM * 4;
            const bool several = last - first > 1;
            if (several && !alike(s, first, last, g * 16 > begin ? g * 16 : begin, g * 16 + 16 < end ? g * 16 + 16 : end) && !finite(from[g], stride[g] / 4, dim)) {
                for (int64_t row = first; row < last; ++row)
                    if (s.begin[row] < s.end[row]) add_values(dim, tile, s, row, row + 1, s.begin[row], s.end[row]);
                return;
            }
        }
        alignas(64) float sums[TILE_ROWS][64];
        for (int64_t row = first; row < last; row += TILE_ROWS)
            for (int64_t d = 0; d < dim; d += 64) {
                const bool all = d + 64 <= dim;  // else 32
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                TileHold::fence();
                for (int64_t g = first_group; g < last_group; ++g) {
                    const uint32_t* at = from[g] + d;
                    _tile_loadd(5, s.weights[row] + g * 8, POSITIONS / 2 * 4);
                    _tile_loadd(7, at, stride[g]);
                    _tile_dpbf16ps(0, 5, 7);
                    _tile_loadd(7, at + 16, stride[g]);
                    _tile_dpbf16ps(1, 5, 7);
                    if (!all) continue;
                    _tile_loadd(7, at + 32, stride[g]);
                    _tile_dpbf16ps(2, 5, 7);
                    _tile_loadd(7, at + 48, stride[g]);
                    _tile_dpbf16ps(3, 5, 7);
                }
                _tile_stored(0, sums[0], 64 * 4);
                _tile_stored(1, sums[0] + 16, 64 * 4);
                _tile_stored(2, sums[0] + 32, 64 * 4);
                _tile_stored(3, sums[0] + 48, 64 * 4);
                TileHold::fence();
                for (int64_t r = 0; r < TILE_ROWS && row + r < last; ++r) {
                    float* out = s.out + (row + r) * dim + d;
                    for (int i = 0; i < (all ? 64 : 32); i += 16) _mm512_store_ps(out + i, _mm512_add_ps(_mm512_load_ps(out + i), _mm512_load_ps(sums[r] + i)));
                }
            }
    }

private:
    TileHold hold_;

    static TileShapes shapes(int64_t rows) {
        TileShapes out;
        out.set(0, 5, rows, 64);
        out.set(5, 6, rows, 32);
        out.set(6, 7, 16, 64);
        out.set(7, 8, 8, 64);
        return out;
    }

    // True when each of the rows sees all of the positions [begin, end).
    static bool alike(const Bf16Scratch& s, int64_t first, int64_t last, int64_t begin, int64_t end) {
        for (int64_t row = first; row < last; ++row)
            if (s.begin[row] > begin || s.end[row] < end) return false;
        return true;
    }

    // Whether 16 positions hold no NaN and no infinity.
    static bool finite(const uint32_t* values, int64_t stride, int64_t dim) {
        const __m512i exponent = _mm512_set1_epi16(0x7F80);
        uint32_t odd = 0;
        for (int64_t pair = 0; pair < 8; ++pair)
            for (int64_t d = 0; d < dim; d += 16)
                odd |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_loadu_si512(values + pair * stride + d), exponent), exponent);
        return odd == 0;
    }

    // A copy of a group of 16 positions with 0 for those that no row sees: 0 times an infinity would be NaN.
    static const uint32_t* seen_only(int64_t dim, const Bf16Tile& tile, Bf16Scratch& s, int64_t group, int64_t begin, int64_t end) {
        auto& copy = s.seen[group * 16 < begin ? 0 : 1];
        for (int64_t pair = 0; pair < 8; ++pair) {
            const int64_t at = group * 16 + pair * 2;
            const uint32_t keep = (at >= begin && at < end ? 0x0000FFFFu : 0u) | (at + 1 >= begin && at + 1 < end ? 0xFFFF0000u : 0u);
            for (int64_t d = 0; d < dim; ++d) copy[pair][d] = keep == 0 ? 0 : tile.values[group * 8 + pair][d] & keep;
        }
        return copy[0];
    }
};

// What comes next, into the second level of cache.
inline void ask_for(const Bf16Tile& tile, int64_t dim) {
    for (int64_t v = 0; v < POSITIONS / 16; ++v)
        for (int64_t i = 0; i < dim / 2; ++i) __builtin_prefetch(tile.keys[v] + i * tile.stride, 0, 2);
    for (int64_t pair = 0; pair < POSITIONS / 2; ++pair)
        for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(tile.values[pair] + d, 0, 2);
}

#endif

// Scores, softmax and outputs of rows [first, last) over a tile of which any of them sees [begin, end).
inline void attend_tile(const AttentionCall& call, Bf16Tile& tile, const Bf16Tile* next, Bf16Scratch& s, int64_t first, int64_t last, int64_t begin,
                        int64_t end) {
#if TANDEM_TILES
    if (Tiles::used()) {
        if (next) ask_for(*next, call.dim);
        AttentionTiles::score(call.dim, tile, s, first, last);
        for (int64_t row = first; row < last; ++row) soften_bf16(call, s, row, call.dim);
        AttentionTiles::add_values(call.dim, tile, s, first, last, begin, end);
        return;
    }
#endif
    (void)begin, (void)end;
    score_bf16_rows(call.dim, tile, next, s, first, last);
    for (int64_t row = first; row < last; ++row) soften_bf16(call, s, row, call.dim);
    add_bf16_values(call.dim, tile, next, s, first, last);
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
    std::optional<AttentionTiles> hold;
    if (Tiles::used()) hold.emplace(task.kv_heads == 1 ? rows : group);
#endif
    TileWalk walk(call, task);
    Bf16Tile tiles[2];
    const bool in_place = call.paired && call.format == KV_BF16;
    if (in_place) find_tile(walk, tiles[0]);
    for (int which = 0; !walk.done(); which ^= 1) {
        Bf16Tile &tile = tiles[which], *next = nullptr;
        if (!in_place) load_tile(walk, s, tile);
        const int64_t start = walk.start, begin = walk.begin(), end = walk.end();
        // With several heads there is one query, and the head's rows all see the tile alike.
        int64_t first = walk.head * group, last = first + group;
        if (task.kv_heads == 1)
            visible_rows(call, task, span, start, s, first, last);
        else
            for (int64_t row = first; row < last; ++row) s.begin[row] = begin, s.end[row] = end;
        walk.advance();
        if (in_place && !walk.done()) find_tile(walk, *(next = &tiles[which ^ 1]));
        if (call.scales && call.paired && !walk.done()) ask_for_codes(walk);
        attend_tile(call, tile, next, s, first, last, begin, end);
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
