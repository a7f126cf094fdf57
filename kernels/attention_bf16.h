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

constexpr int FEW_ROWS = 6;  // that many or fewer are reduced one by one
constexpr int HEADS = 4;     // of one query that are taken together

struct Bf16Scratch : AttentionRows {
    alignas(64) uint32_t keys[POSITIONS / 16][MAX_DIM / 2][16];  // of a tile in plain order, as are the values
    alignas(64) uint32_t values[POSITIONS / 2][MAX_DIM];
    alignas(64) uint32_t edges[2][MAX_DIM];  // pairs of which a row must not see one half
    // Whole tiles of rows are read.
    alignas(64) uint32_t queries[(GROUP_ROWS + 15) * MAX_DIM / 2];  // [rows][dim / 2], without gaps: they would leave sets of the cache unused
    alignas(64) uint32_t weights[GROUP_ROWS + 15][POSITIONS / 2];
    alignas(64) uint32_t halves[HEADS][2][POSITIONS / 4][MAX_DIM];  // of tiles whose values don't lie as AMX takes them
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

// 2^(x * unit) for x <= 0 and unit > 0, relative error about 1e-4: the results are rounded to bf16. 1 for 0; less than any normal number, which
// bf16 has as 0, from a product of -126 on. NaNs stay.
static inline __m512 exp2_roughly(__m512 x, __m512 unit, __m512 least) {
    const __m512 magic = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to an integer in its last bits
    x = _mm512_max_ps(least, x);
    const __m512 t = _mm512_fmadd_ps(x, unit, magic), f = _mm512_fmsub_ps(x, unit, _mm512_sub_ps(t, magic));
    __m512 p = _mm512_set1_ps(5.500892e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4221097e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9328293e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}

struct Larger {
    __m512 operator()(__m512 a, __m512 b) const { return _mm512_max_ps(a, b); }
};
struct Sum {
    __m512 operator()(__m512 a, __m512 b) const { return _mm512_add_ps(a, b); }
};

// Lane i of the result: the lanes of x[i] taken together, by halves, the same tree for each.
template <class Together>
inline __m512 reduce_rows(const __m512* x, const Together& together) {
    static constexpr int PLACE[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};  // where the shuffles bring each
    __m512 a[8];
    for (int i = 0; i < 8; ++i) {
        const __m512 low = x[PLACE[i]], high = x[PLACE[i + 8]];
        a[i] = together(_mm512_shuffle_f32x4(low, high, 0x44), _mm512_shuffle_f32x4(low, high, 0xEE));
    }
    for (int i = 0; i < 4; ++i) a[i] = together(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD));
    for (int i = 0; i < 2; ++i) a[i] = together(_mm512_shuffle_ps(a[i], a[i + 2], 0x44), _mm512_shuffle_ps(a[i], a[i + 2], 0xEE));
    return together(_mm512_shuffle_ps(a[0], a[1], 0x88), _mm512_shuffle_ps(a[0], a[1], 0xDD));
}

// The lanes of x taken together as `reduce_rows` does it.
template <class Together>
inline float reduce_row(__m512 x, const Together& together) {
    x = together(x, _mm512_shuffle_f32x4(x, x, 0x4E));
    x = together(x, _mm512_shuffle_f32x4(x, x, 0xB1));
    x = together(x, _mm512_shuffle_ps(x, x, 0x4E));
    return _mm512_cvtss_f32(together(x, _mm512_shuffle_ps(x, x, 0xB1)));
}

// The scores of a row, which lie at `slot`, as they count, from here on in their place: times their keys' scales, and nothing where the row must not see.
inline void finish_scores(const AttentionCall& call, Bf16Scratch& s, int64_t row, int64_t slot) {
    if (call.scales == nullptr && s.begin[row] == 0 && s.end[row] == POSITIONS) return;
    const uint64_t all = ~(uint64_t)0, seen = (all << s.begin[row]) & (all >> (POSITIONS - s.end[row]));
    float* scores = s.scores + slot * POSITIONS;
    for (int v = 0; v < 4; ++v) {
        const __m512 raw = _mm512_load_ps(scores + 16 * v), scaled = call.scales ? _mm512_mul_ps(raw, _mm512_load_ps(s.key_scales + 16 * v)) : raw;
        _mm512_store_ps(scores + 16 * v, _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (__mmask16)(seen >> 16 * v), scaled));
    }
}

// Weights of a row from its scores, given the highest so far; stored as pairs of bf16. Returns their sum by lanes.
inline __m512 weigh(const AttentionCall& call, Bf16Scratch& s, int64_t slot, __m512 unit, __m512 least, float highest) {
    const float* scores = s.scores + slot * POSITIONS;
    const __m512 now = _mm512_set1_ps(highest);
    __m512 value[4];
    for (int v = 0; v < 4; ++v) value[v] = exp2_roughly(_mm512_sub_ps(_mm512_load_ps(scores + 16 * v), now), unit, least);
    const __m512 total = _mm512_add_ps(_mm512_add_ps(value[0], value[1]), _mm512_add_ps(value[2], value[3]));
    if (call.scales)
        for (int v = 0; v < 4; ++v) {
            const __mmask16 some = _mm512_cmp_ps_mask(value[v], _mm512_set1_ps(1.17549435e-38f), _CMP_NLT_UQ);  // what is not seen has any scale
            value[v] = _mm512_maskz_mul_ps(some, value[v], _mm512_load_ps(s.value_scales + 16 * v));
        }
    _mm512_store_si512(s.weights[slot], (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]));
    _mm512_store_si512(s.weights[slot] + 16, (__m512i)_mm512_cvtne2ps_pbh(value[3], value[2]));
    return total;
}

inline __m512 largest_scores(const Bf16Scratch& s, int64_t slot) {
    const float* scores = s.scores + slot * POSITIONS;
    const Larger larger;
    return larger(larger(_mm512_load_ps(scores), _mm512_load_ps(scores + 16)), larger(_mm512_load_ps(scores + 32), _mm512_load_ps(scores + 48)));
}

// `soften` of attention.h in powers of 2, for rows [row, row + count) of at most 16, whose scores and weights lie from `slot` on.
inline void soften_bf16(const AttentionCall& call, Bf16Scratch& s, int64_t row, int64_t count, int64_t dim, int64_t slot) {
    const float power = call.scale * 1.44269504088896341f;
    const __m512 unit = _mm512_set1_ps(power), least = _mm512_set1_ps(-126.3f / power);
    const __mmask16 rows = (__mmask16)((1u << count) - 1);
    alignas(64) __m512 each[16];
    for (int64_t r = 0; r < count; ++r) finish_scores(call, s, row + r, slot + r), each[r] = largest_scores(s, slot + r);
    __m512 best = _mm512_setzero_ps();
    if (count > FEW_ROWS) {
        for (int64_t r = count; r < 16; ++r) each[r] = _mm512_setzero_ps();
        best = reduce_rows(each, Larger());
    } else {
        for (int64_t r = 0; r < count; ++r) best = _mm512_mask_mov_ps(best, (__mmask16)(1u << r), _mm512_set1_ps(reduce_row(each[r], Larger())));
    }
    const __m512 before = _mm512_maskz_loadu_ps(rows, s.highest + row), now = _mm512_max_ps(best, before);
    // From nothing seen (-inf) to whatever is seen now, 0; and 1 where nothing changes.
    const __m512 shrink = exp2_roughly(_mm512_sub_ps(before, now), unit, least);
    const __mmask16 changed = _mm512_mask_cmp_ps_mask(rows, now, before, _CMP_NEQ_UQ);
    alignas(64) float highest[16], factor[16];
    _mm512_store_ps(highest, now);
    _mm512_store_ps(factor, shrink);
    for (int64_t r = 0; r < count; ++r) each[r] = weigh(call, s, slot + r, unit, least, highest[r]);
    __m512 total = _mm512_setzero_ps();
    if (count > FEW_ROWS)
        total = reduce_rows(each, Sum());
    else
        for (int64_t r = 0; r < count; ++r) total = _mm512_mask_mov_ps(total, (__mmask16)(1u << r), _mm512_set1_ps(reduce_row(each[r], Sum())));
    _mm512_mask_storeu_ps(s.highest + row, rows, now);
    _mm512_mask_storeu_ps(s.total + row, rows, _mm512_fmadd_ps(_mm512_maskz_loadu_ps(rows, s.total + row), shrink, total));
    for (uint32_t left = changed; left != 0; left &= left - 1) {
        const int64_t r = __builtin_ctz(left);
        float* out = s.out + (row + r) * dim;
        const __m512 by = _mm512_set1_ps(factor[r]);
        for (int64_t d = 0; d < dim; d += 16) _mm512_store_ps(out + d, _mm512_mul_ps(_mm512_load_ps(out + d), by));
    }
}

inline void soften_bf16_rows(const AttentionCall& call, Bf16Scratch& s, int64_t first, int64_t last, int64_t dim) {
    for (int64_t row = first; row < last; row += 16) soften_bf16(call, s, row, last - row < 16 ? last - row : 16, dim, row);
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

// The products of a task by AMX tiles, where the CPU has them. Sums are chains over 32 dims, or 32 positions, a step: free of the rows
// beside a row, but not the bits of `pairs_tile`. Tiles 0 to 3: sums of four vectors; 4: queries or weights; 5 to 7: keys or values.
class AttentionTiles {
public:
    static constexpr int64_t PIECE = 32;  // positions that one instruction adds; its sums depend on which those are

    // Values of 32 positions of the tile, and where their weights begin. `stride`: between pairs of positions.
    struct Piece {
        const uint32_t* values;
        int64_t stride, weights;
    };
    // Those of a tile that rows see.
    struct Pieces {
        Piece each[POSITIONS / PIECE];
        int64_t count = 0;
    };

    // For up to `rows` rows of a head at a time.
    explicit AttentionTiles(int64_t rows) : rows_(rows < TILE_ROWS ? rows : (int64_t)TILE_ROWS), hold_(shapes(rows_)) {}

    // Scores of 16 rows from `row` on, written from `slot` on. There may be fewer.
    static void score(int64_t dim, const Bf16Tile& tile, Bf16Scratch& s, int64_t row, int64_t slot) {
        TileHold::fence();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = 0; i < dim / 2; i += 16) {
            const int64_t at = i * tile.stride, stride = tile.stride * 4;
            _tile_loadd(4, s.queries + row * dim / 2 + i, dim / 2 * 4);
            _tile_loadd(5, tile.keys[0] + at, stride);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, tile.keys[1] + at, stride);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, tile.keys[2] + at, stride);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, tile.keys[3] + at, stride);
            _tile_dpbf16ps(3, 4, 5);
        }
        float* to = s.scores + slot * POSITIONS;
        _tile_stored(0, to, POSITIONS * 4);
        _tile_stored(1, to + 16, POSITIONS * 4);
        _tile_stored(2, to + 32, POSITIONS * 4);
        _tile_stored(3, to + 48, POSITIONS * 4);
        TileHold::fence();
    }

    // The values of positions [begin, end) of the tile, maybe copied to `halves`.
    static Pieces values_of(int64_t dim, const Bf16Tile& tile, uint32_t (*halves)[POSITIONS / 4][MAX_DIM], int64_t begin, int64_t end) {
        Pieces out;
        for (int64_t half = begin / PIECE; half < (end + PIECE - 1) / PIECE; ++half) {
            const int64_t from = half * PIECE > begin ? half * PIECE : begin, to = half * PIECE + PIECE < end ? half * PIECE + PIECE : end;
            out.each[out.count++] = piece_of(dim, tile, halves[half][0], half, from, to);
        }
        return out;
    }

    // True when rows [first, last) may be taken together: each weight of what a row doesn't see is 0, which times a NaN or an infinity is none.
    static bool together(int64_t dim, const Pieces& pieces, const Bf16Scratch& s, int64_t first, int64_t last, int64_t begin, int64_t end) {
        return last - first == 1 || alike(s, first, last, begin, end) || finite(pieces, dim);
    }

    // out += weights . values for rows [row, row + count) of at most 16, whose weights lie from `slot` on.
    void add(int64_t dim, const Pieces& pieces, Bf16Scratch& s, int64_t row, int64_t count, int64_t slot) const {
        alignas(64) float some[TILE_ROWS][64];
        for (int64_t d = 0; d < dim; d += 64) {
            const int64_t width = dim - d < 64 ? dim - d : 64;
            float* out = s.out + row * dim + d;
            if (count == rows_) {
                add_pieces(pieces, s.weights[slot], d, width == 64, out, dim);
                continue;
            }
            for (int64_t r = 0; r < count; ++r) std::memcpy(some[r], out + r * dim, (size_t)width * 4);
            add_pieces(pieces, s.weights[slot], d, width == 64, some[0], 64);
            for (int64_t r = 0; r < count; ++r) std::memcpy(out + r * dim, some[r], (size_t)width * 4);
        }
    }

private:
    const int64_t rows_;
    TileHold hold_;

    // Half a tile, of which rows see [from, to): in place if its pairs lie one behind the other and all are seen, else copied, with 0 for
    // those that no row sees: 0 times an infinity would be NaN.
    static Piece piece_of(int64_t dim, const Bf16Tile& tile, uint32_t* copy, int64_t half, int64_t from, int64_t to) {
        const uint32_t* const* pairs = tile.values + half * PIECE / 2;
        const int64_t stride = pairs[1] - pairs[0], first = half * PIECE;
        if (to - from == PIECE && pairs[8] == pairs[0] + 8 * stride && pairs[9] == pairs[8] + stride) return {pairs[0], stride, first / 2};
        for (int64_t i = 0; i < PIECE / 2; ++i) {
            const int64_t at = first + 2 * i;
            const uint32_t keep = (at >= from && at < to ? 0x0000FFFFu : 0u) | (at + 1 >= from && at + 1 < to ? 0xFFFF0000u : 0u);
            const __m512i mask = _mm512_set1_epi32((int32_t)keep);
            for (int64_t d = 0; d < dim; d += 16)
                _mm512_store_si512(copy + i * dim + d, keep == 0 ? mask : _mm512_and_si512(_mm512_loadu_si512(pairs[i] + d), mask));
        }
        return {copy, dim, first / 2};
    }

    // to[rows][64 columns, or 32] += the pieces' weights . values of columns from d on. `stride`: of rows of `to`.
    static void add_pieces(const Pieces& pieces, const uint32_t* weights, int64_t d, bool all, float* to, int64_t stride) {
        TileHold::fence();
        _tile_loadd(0, to, stride * 4);
        _tile_loadd(1, to + 16, stride * 4);
        if (all) {
            _tile_loadd(2, to + 32, stride * 4);
            _tile_loadd(3, to + 48, stride * 4);
        }
        for (int64_t i = 0; i < pieces.count; ++i) {
            const Piece& piece = pieces.each[i];
            const uint32_t* at = piece.values + d;
            const int64_t bytes = piece.stride * 4;
            _tile_loadd(4, weights + piece.weights, POSITIONS / 2 * 4);
            _tile_loadd(5, at, bytes);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, at + 16, bytes);
            _tile_dpbf16ps(1, 4, 6);
            if (!all) continue;
            _tile_loadd(7, at + 32, bytes);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, at + 48, bytes);
            _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(0, to, stride * 4);
        _tile_stored(1, to + 16, stride * 4);
        if (all) {
            _tile_stored(2, to + 32, stride * 4);
            _tile_stored(3, to + 48, stride * 4);
        }
        TileHold::fence();
    }

    static TileShapes shapes(int64_t rows) {
        TileShapes out;
        out.set(0, 5, rows, 64);
        out.set(5, 8, 16, 64);
        return out;
    }

    // True when each of the rows sees all of the positions [begin, end).
    static bool alike(const Bf16Scratch& s, int64_t first, int64_t last, int64_t begin, int64_t end) {
        for (int64_t row = first; row < last; ++row)
            if (s.begin[row] > begin || s.end[row] < end) return false;
        return true;
    }

    // Whether they hold no NaN and no infinity.
    static bool finite(const Pieces& pieces, int64_t dim) {
        const __m512i exponent = _mm512_set1_epi16(0x7F80);
        uint32_t odd = 0;
        for (int64_t i = 0; i < pieces.count; ++i)
            for (int64_t pair = 0; pair < PIECE / 2; ++pair)
                for (int64_t d = 0; d < dim; d += 16) {
                    const __m512i values = _mm512_loadu_si512(pieces.each[i].values + pair * pieces.each[i].stride + d);
                    odd |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(values, exponent), exponent);
                }
        return odd == 0;
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

// Tiles of up to HEADS heads at the same positions, of which rows [first, last), `group` a head, see [begin, end).
struct TileStep {
    Bf16Tile tiles[HEADS];
    int64_t heads = 0, start, begin, end, first, last;
};

// What is to be done next: of one query several heads where they can be read in place; else one head, whose rows are found by the caller.
inline TileStep next_step(TileWalk& walk, Bf16Scratch& s, bool in_place, int64_t group) {
    TileStep step;
    step.start = walk.start, step.begin = walk.begin(), step.end = walk.end(), step.first = walk.head * group;
    do {
        if (in_place)
            find_tile(walk, step.tiles[step.heads]);
        else
            load_tile(walk, s, step.tiles[step.heads]);
        ++step.heads;
        walk.advance();
    } while (in_place && step.heads < HEADS && walk.head != 0);
    step.last = step.first + step.heads * group;
    return step;
}

#if TANDEM_TILES
// Scores, softmax and outputs of the rows of one head by AMX tiles, 16 at a time: the scores of the next ones are under way while a
// softmax is made, and nothing but queries and outputs leaves the first level of cache.
inline void attend_head(const AttentionCall& call, const AttentionTiles& amx, const TileStep& step, Bf16Scratch& s) {
    const int64_t dim = call.dim, first = step.first, last = step.last;
    const Bf16Tile& tile = step.tiles[0];
    const AttentionTiles::Pieces pieces = AttentionTiles::values_of(dim, tile, s.halves[0], step.begin, step.end);
    if (!AttentionTiles::together(dim, pieces, s, first, last, step.begin, step.end)) {
        for (int64_t row = first; row < last; ++row) {
            if (s.begin[row] >= s.end[row]) continue;
            AttentionTiles::score(dim, tile, s, row, 0);
            soften_bf16(call, s, row, 1, dim, 0);
            amx.add(dim, AttentionTiles::values_of(dim, tile, s.halves[0], s.begin[row], s.end[row]), s, row, 1, 0);
        }
        return;
    }
    AttentionTiles::score(dim, tile, s, first, 0);
    for (int64_t row = first, slot = 0; row < last; row += TILE_ROWS, slot ^= TILE_ROWS) {
        const int64_t count = last - row < TILE_ROWS ? last - row : (int64_t)TILE_ROWS;
        if (row + count < last) AttentionTiles::score(dim, tile, s, row + count, slot ^ TILE_ROWS);
        soften_bf16(call, s, row, count, dim, slot);
        amx.add(dim, pieces, s, row, count, slot);
    }
}

// The same for heads of one query, side by side: each would wait long for its own results.
inline void attend_heads(const AttentionCall& call, const AttentionTiles& amx, const TileStep& step, Bf16Scratch& s) {
    const int64_t dim = call.dim, group = (step.last - step.first) / step.heads;
    AttentionTiles::Pieces pieces[HEADS];
    for (int64_t h = 0; h < step.heads; ++h) pieces[h] = AttentionTiles::values_of(dim, step.tiles[h], s.halves[h], step.begin, step.end);
    for (int64_t h = 0; h < step.heads; ++h)
        for (int64_t row = step.first + h * group; row < step.first + (h + 1) * group; row += TILE_ROWS) AttentionTiles::score(dim, step.tiles[h], s, row, row);
    soften_bf16_rows(call, s, step.first, step.last, dim);
    for (int64_t h = 0; h < step.heads; ++h) {
        const int64_t last = step.first + (h + 1) * group;
        for (int64_t row = last - group; row < last; row += TILE_ROWS) amx.add(dim, pieces[h], s, row, last - row < TILE_ROWS ? last - row : (int64_t)TILE_ROWS, row);
    }
}
#endif

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
