// Attention over tiles of bf16 pairs by AMX, where the CPU has it; see attention_bf16.h.
#pragma once

#include "bf16_softmax.h"
#include "tiles.h"

namespace tandem {

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

}  // namespace tandem
