// Matrix products of float32 rows with packed weights; see kernels/linear.py for the promise and the layout.
//
// Packed weights: panels of 64 output columns, [ceil(N/64)][K][64], zeros in the columns beyond N. bf16 panels hold, for each k and
// each pair of vectors, 32-bit words whose low half is a column of the first vector and whose high half is one of the second,
// so that a shift and a mask expand them.
//
// Every output element is sum_k x[k] * w[k], one fma after the other in the order of k, from +0. Blocks of k park the sum in memory as
// float32 between blocks, which changes no bit. So row tiles, column tiles, k blocks and threads are free choices.

#include "tile.h"

using namespace tandem;

namespace {

constexpr int PANEL = 64;
constexpr int K_BLOCK = 128;       // a panel's k block is 32 KB: it stays in L1
constexpr int ROW_BLOCK = 96;      // rows of one task in large products
constexpr int PREFETCH_TILES = 2;  // row tiles that prefetch the next k block: 2 x 16 KB
constexpr int SMALL_ROWS = 64;     // up to here weights go straight to registers, without k blocks

struct Bf16Weights {
    typedef uint16_t type;
    static inline void expand(const uint16_t* w, int vectors, vf* out) {
        for (int v = 0; v < vectors; v += 2) {
            vu words;
            std::memcpy(&words, w + v * VW, sizeof words);
            out[v] = (vf)(words << 16);
            out[v + 1] = (vf)(words & 0xFFFF0000u);
        }
    }
};

struct Product {
    const float* x;
    const void* weights;
    const float* bias;
    float* out;
    int64_t m, n, k;
};

// Copy finished columns out of a scratch tile, adding the bias.
void finish(const Product& p, const float* scratch, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r) {
        float* out = p.out + (row + r) * p.n + column;
        for (int64_t j = 0; j < columns; ++j)
            out[j] = p.bias ? scratch[r * PANEL + j] + p.bias[column + j] : scratch[r * PANEL + j];
    }
}

// Rows are spread evenly over the fewest tiles: 8 rows are 4 + 4, not 6 + 2.
inline int64_t tile_begin(int64_t rows, int64_t tiles, int64_t i) { return rows * i / tiles; }

// Few rows: unit = the columns of one register tile; weights go from memory to registers, once for each 6 rows.
template <class Weights>
void small_unit(const Product& p, int64_t unit) {
    typedef typename Weights::type type;
    constexpr int64_t UNITS = PANEL / TILE;
    // A tile of whole panel rows reads memory in one run: prefetch 4 KB ahead, about the latency of memory at its bandwidth.
    constexpr int LINES = UNITS == 1 ? (int)(PANEL * sizeof(type) / 64) : 0;
    const type* w = (const type*)p.weights + (unit / UNITS) * p.k * PANEL + (unit % UNITS) * TILE;
    const int64_t column = unit * TILE, columns = p.n - column < TILE ? p.n - column : TILE;
    if (columns <= 0) return;
    alignas(64) float scratch[SMALL_ROWS * PANEL];
    const int64_t tiles = (p.m + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t i = 0; i < tiles; ++i) {
        const int64_t row = tile_begin(p.m, tiles, i), rows = tile_begin(p.m, tiles, i + 1) - row;
        tile_rows<Weights, TILE_VECTORS, LINES>(rows, p.x + row * p.k, p.k, w, PANEL, p.k, scratch + row * PANEL, PANEL, true,
                                           (const char*)w + 4096);
    }
    finish(p, scratch, 0, p.m, column, columns);
}

// Bring a k block of a unit to L1 as float32 rows of TILE columns.
template <class Weights>
void expand_block(const typename Weights::type* w, int64_t k, float* block) {
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < TILE; j += 2 * VW) {
            vf pair[2];
            Weights::expand(w + i * PANEL + j, 2, pair);
            store(block + i * TILE + j, pair[0]);
            store(block + i * TILE + j + VW, pair[1]);
        }
}

// Many rows: task = one unit of columns, up to ROW_BLOCK rows. A k block of weights, in L1, serves all rows, while the next one is
// prefetched line by line: so reading weights and multiplying overlap.
template <class Weights>
void large_task(const Product& p, int64_t unit, int64_t row, int64_t rows) {
    typedef typename Weights::type type;
    constexpr bool EXPAND = sizeof(type) < 4;
    constexpr int64_t UNITS = PANEL / TILE;
    const type* w = (const type*)p.weights + (unit / UNITS) * p.k * PANEL + (unit % UNITS) * TILE;
    const int64_t column = unit * TILE, columns = p.n - column < TILE ? p.n - column : TILE;
    if (columns <= 0) return;
    alignas(64) float expanded[EXPAND ? K_BLOCK * TILE : 1];
    alignas(64) float scratch[ROW_BLOCK * PANEL];
    const int64_t tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t k0 = 0; k0 < p.k; k0 += K_BLOCK) {
        const int64_t kn = p.k - k0 < K_BLOCK ? p.k - k0 : K_BLOCK;
        const float* block = (const float*)(const void*)(w + k0 * PANEL);
        if (EXPAND) expand_block<Weights>(w + k0 * PANEL, kn, expanded), block = expanded;
        const char* next = (const char*)(w + (k0 + kn) * PANEL);
        for (int64_t i = 0; i < tiles; ++i, next += kn * 2 * 64) {
            const int64_t r = tile_begin(rows, tiles, i), rn = tile_begin(rows, tiles, i + 1) - r;
            const float* x = p.x + (row + r) * p.k + k0;
            float* c = scratch + r * PANEL;
            if (i < PREFETCH_TILES)
                tile_rows<FloatWeights, TILE_VECTORS, 2>(rn, x, p.k, block, EXPAND ? TILE : PANEL, kn, c, PANEL, k0 == 0, next);
            else
                tile_rows<FloatWeights, TILE_VECTORS, 0>(rn, x, p.k, block, EXPAND ? TILE : PANEL, kn, c, PANEL, k0 == 0);
        }
    }
    finish(p, scratch, row, rows, column, columns);
}

template <class Weights>
void product(const Product& p, int threads) {
    const int64_t units = (p.n + TILE - 1) / TILE;
    if (p.m <= SMALL_ROWS)
        return parallel_static(threads, units, [&](int64_t begin, int64_t end) {
            for (int64_t unit = begin; unit < end; ++unit) small_unit<Weights>(p, unit);
        });
    const int64_t blocks = (p.m + ROW_BLOCK - 1) / ROW_BLOCK;
    parallel_dynamic(threads, units * blocks, [&](int64_t task) {
        const int64_t i = task % blocks, row = p.m * i / blocks;
        large_task<Weights>(p, task / blocks, row, p.m * (i + 1) / blocks - row);
    });
}

// Where column j of a panel row lives: itself for float32; paired words for bf16 (see the top).
inline int64_t bf16_place(int64_t j) {
    const int64_t vector = j / VW, lane = j % VW;
    return (vector / 2) * 2 * VW + lane * 2 + vector % 2;
}

template <class T, bool PAIRED>
void pack(const T* weight, T* packed, int64_t first, int64_t n, int64_t k, int threads) {
    // One task is one panel, so that no two threads write to one cache line; transposed in squares that fit L1.
    const int64_t panel0 = first / PANEL, panels = (first + n + PANEL - 1) / PANEL - panel0;
    parallel_static(threads, panels, [&](int64_t begin, int64_t end) {
        for (int64_t panel = panel0 + begin; panel < panel0 + end; ++panel) {
            const int64_t lo = panel * PANEL < first ? first : panel * PANEL;
            const int64_t hi = (panel + 1) * PANEL > first + n ? first + n : (panel + 1) * PANEL;
            for (int64_t k0 = 0; k0 < k; k0 += 64)
                for (int64_t row = lo; row < hi; ++row) {
                    const int64_t j = PAIRED ? bf16_place(row % PANEL) : row % PANEL;
                    const int64_t k1 = k0 + 64 < k ? k0 + 64 : k;
                    for (int64_t i = k0; i < k1; ++i) packed[(panel * k + i) * PANEL + j] = weight[(row - first) * k + i];
                }
        }
    });
}

}  // namespace

extern "C" {

// Where column j of a bf16 panel row lies.
int64_t tandem_bf16_place(int64_t j) { return bf16_place(j); }

// Put weight [n][k] (float32, or bf16 bits when is_bf16) at output columns [first, first + n) of the zeroed `packed`.
void tandem_linear_pack(const void* weight, void* packed, int64_t first, int64_t n, int64_t k, int32_t is_bf16, int32_t threads) {
    if (is_bf16)
        pack<uint16_t, true>((const uint16_t*)weight, (uint16_t*)packed, first, n, k, threads);
    else
        pack<float, false>((const float*)weight, (float*)packed, first, n, k, threads);
}

// out[m][n] = x[m][k] . packed + bias (bias may be null).
void tandem_linear(const float* x, const void* packed, const float* bias, float* out, int64_t m, int64_t n, int64_t k, int32_t is_bf16,
                   int32_t threads) {
    const Product p{x, packed, bias, out, m, n, k};
    if (is_bf16)
        product<Bf16Weights>(p, threads);
    else
        product<FloatWeights>(p, threads);
}
}
