// Tiles of 64 positions of a paged cache as pairs of bf16, and a task's way over them; see attention_bf16.h.
#pragma once

#include "attention.h"
#include "kv_order.h"

namespace tandem {

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

constexpr int HEADS = 4;  // of one query that are taken together

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

#endif

}  // namespace tandem
