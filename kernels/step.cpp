// A whole step of a transformer with int8 products: embedding to logits in one parallel region; see kernels/step.py.
//
// Phases, with a barrier behind each: norm (and quantise) -> q, k, v -> rotate and cache -> attend (and quantise) -> output product, added
// to the residual -> norm -> gate and up, silu, quantise -> down product, added to the residual. Threads take tasks of a phase one by
// one. A row goes through the same operations in the same order whatever the other rows, the tiles and the threads are.

#include <sched.h>

#include <vector>

#include "activation.h"
#include "attention_bf16.h"
#include "norm.h"
#include "rope.h"
#include "step.h"

using namespace tandem;

namespace {

// Threads meet; they spin a while, since phases are short, then let others run.
class Barrier {
public:
    void wait(int threads) {
        if (threads == 1) return;
        const int turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
            if (spins < 4000) {
#if defined(__SSE__)
                _mm_pause();
#endif
            } else {
                sched_yield();
            }
        }
    }

private:
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> turn_{0};
};

// Memory for `rows` quantised rows of `width`, cut from a cursor.
Rows take_rows(char*& at, int64_t rows, int64_t width) {
    const auto take = [&](int64_t bytes) {
        char* start = at;
        at += (bytes + 63) / 64 * 64;
        return start;
    };
    const int64_t groups = rows * (width / GROUP);
    Rows out;
    out.codes = (int8_t*)take(rows * width);
    out.scales = (float*)take(groups * 4);
    out.minus8 = (int32_t*)take(groups * 4);
    out.sums = (uint16_t*)take(groups * 2);
    out.width = width;
    return out;
}

float* take_floats(char*& at, int64_t count) {
    char* start = at;
    at += (count * 4 + 63) / 64 * 64;
    return (float*)start;
}

struct Workspace {
    float *residual, *qkv, *q, *mixed;
    Rows x, attended, inner, rest;  // x: normed rows; rest: what quantising `inner` left over

    // With a null base only the size is of use: `end`.
    char* end;
    Workspace(const ModelArgs& m, int64_t tokens, int64_t num_rows, char* base) {
        const int64_t rows = tokens > num_rows ? tokens : num_rows;
        char* at = base;
        residual = take_floats(at, tokens * m.hidden);
        qkv = take_floats(at, tokens * (m.heads + 2 * m.kv_heads) * m.dim);
        q = take_floats(at, tokens * m.heads * m.dim);
        mixed = take_floats(at, tokens * m.heads * m.dim);
        x = take_rows(at, rows, padded(m.hidden));
        attended = take_rows(at, tokens, padded(m.heads * m.dim));
        inner = take_rows(at, tokens, padded(m.inner));
        rest = take_rows(at, tokens, padded(m.inner));
        end = at;
    }
};

struct Run {
    const ModelArgs& m;
    const StepArgs& s;
    Workspace w;
    std::vector<AttentionTask> tasks;
    std::vector<std::atomic<int64_t>> next;  // a counter a phase
    Barrier barrier;

    Run(const ModelArgs& model, const StepArgs& step)
        : m(model), s(step), w(model, step.tokens, step.num_rows, (char*)step.workspace), next((size_t)(8 * model.num_layers + 3)) {}
};

// One thread's way through the step: the phases it has left behind.
struct Walker {
    Run& run;
    int threads;
    int64_t phase = 0;

    // body(task) for the tasks of this phase that nobody has taken, `chunk` at a time; then all meet.
    template <class Body>
    void each(int64_t count, int64_t chunk, const Body& body) {
        std::atomic<int64_t>& next = run.next[(size_t)phase++];
        for (int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed); begin < count;
             begin = next.fetch_add(chunk, std::memory_order_relaxed))
            for (int64_t task = begin; task < begin + chunk && task < count; ++task) body(task);
        run.barrier.wait(threads);
    }
};

int64_t chunk_of(int64_t tasks, int threads) {
    const int64_t chunk = tasks / (threads * 8);
    return chunk < 1 ? 1 : chunk;
}

void embed(const ModelArgs& m, int64_t id, float* out) {
    if (m.table == nullptr) {
        int8_column(m.head, id, out);
    } else if (m.table_bf16) {
        const uint16_t* row = (const uint16_t*)m.table + id * m.hidden;
        for (int64_t i = 0; i < m.hidden; ++i) out[i] = bf16_to_float(row[i]);
    } else {
        std::memcpy(out, (const float*)m.table + id * m.hidden, (size_t)m.hidden * 4);
    }
}

// Norm a row of the residual and quantise it as row `to` of w.x.
void norm_row(const Run& run, const float* weight, int64_t from, int64_t to) {
    alignas(64) float normed[1 << 15];
    normalise(run.w.residual + from * run.m.hidden, nullptr, weight, normed, run.m.hidden, (float)run.m.eps);
    quantise_row(normed, run.m.hidden, run.w.x, to);
}

// Blocks of rows and panels of columns as tasks; finish(row, rows, panel, c) gets each tile's sums c[rows][32].
template <class Finish>
void product(Walker& walker, const Matrix& matrix, const Rows& x, const Rows* more, int64_t rows, int64_t panels_a_task, const Finish& finish) {
    const int64_t panels = (matrix.n + COLUMNS - 1) / COLUMNS, column_tasks = (panels + panels_a_task - 1) / panels_a_task;
    // Few columns for many threads: rows are split too. Each block of rows reads the weights anew.
    int64_t blocks = 1;
    while (column_tasks * blocks < walker.threads * 4 && rows / (blocks + 1) >= 4 * INT8_ROWS) ++blocks;
    // Quantised columns of a row share cache lines: there each thread keeps to one run of columns.
    const int64_t chunk = panels_a_task > 1 ? (column_tasks + walker.threads - 1) / walker.threads : chunk_of(column_tasks, walker.threads);
    walker.each(column_tasks * blocks, blocks == 1 ? chunk : 1, [&](int64_t task) {
        const int64_t block = task % blocks, begin = rows * block / blocks, count = rows * (block + 1) / blocks - begin;
        const int64_t tiles = int8_tiles(count), first_panel = task / blocks * panels_a_task;
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t row = begin + count * i / tiles, tile_rows = begin + count * (i + 1) / tiles - row;
            for (int64_t p = first_panel; p < first_panel + panels_a_task && p < panels; ++p) {
                alignas(64) float c[INT8_ROWS * COLUMNS];
                int8_panel(matrix, p, x, row, tile_rows, true, c);
                if (more) int8_panel(matrix, p, *more, row, tile_rows, false, c);
                finish(row, tile_rows, p, c);
            }
        }
    });
}

// Sums (and bias) stored to out[row][n], or added to it.
template <bool ADD>
struct Store {
    const Matrix& matrix;
    float* out;
    void operator()(int64_t row, int64_t rows, int64_t panel, const float* c) const {
        const int64_t column = panel * COLUMNS, columns = matrix.n - column < COLUMNS ? matrix.n - column : COLUMNS;
        for (int64_t r = 0; r < rows; ++r) {
            float* to = out + (row + r) * matrix.n + column;
            const float* from = c + r * COLUMNS;
            if (columns == COLUMNS && !matrix.bias) {
                for (int64_t j = 0; j < COLUMNS; j += VW) store(to + j, ADD ? load(to + j) + load(from + j) : load(from + j));
                continue;
            }
            for (int64_t j = 0; j < columns; ++j) {
                const float value = matrix.bias ? from[j] + matrix.bias[column + j] : from[j];
                to[j] = ADD ? to[j] + value : value;
            }
        }
    }
};

// Panels of gate and up columns -> silu(gate) * up, quantised as a group of w.inner once two panels are there.
struct Gate {
    const Matrix& matrix;
    const Rows &inner, *rest;
    alignas(64) mutable float group[INT8_ROWS][GROUP];
    void operator()(int64_t row, int64_t rows, int64_t panel, const float* c) const {
        const int64_t half = panel % 2 * 16;
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t j = 0; j < 16; j += VW) {
                vf gate = load(c + r * COLUMNS + j), up = load(c + r * COLUMNS + 16 + j);
                if (matrix.bias) {
                    gate = gate + load(matrix.bias + panel * COLUMNS + j);
                    up = up + load(matrix.bias + panel * COLUMNS + 16 + j);
                }
                store(group[r] + half + j, silu_mul(gate, up));
            }
            if (half == 0) continue;
            quantise_group(group[r], inner, row + r, panel / 2);
            if (rest) quantise_rest(group[r], inner, *rest, row + r, panel / 2);
        }
    }
};

void attention(Walker& walker, const LayerArgs& layer, void* cache) {
    Run& run = walker.run;
    const ModelArgs& m = run.m;
    const StepArgs& s = run.s;
    const int64_t width = m.heads * m.dim, group = m.heads / m.kv_heads;
    const AttentionCall call{run.w.q,  run.w.mixed, cache,        s.tables,     s.query_starts, s.context_lens, m.heads,
                             m.kv_heads, m.dim,     s.num_blocks, s.block_size, s.block_stride, s.table_stride, layer.window,
                             1.0f / std::sqrt((float)m.dim)};
    walker.each((int64_t)run.tasks.size(), 1, [&](int64_t number) {
        const AttentionTask& task = run.tasks[(size_t)number];
        attend(call, task, s.is_bf16 != 0, true);
        const int64_t first = s.query_starts[task.sequence] + task.query, column = task.kv_head * group * m.dim;
        for (int64_t row = first; row < first + task.count; ++row)
            for (int64_t i = 0; i < task.kv_heads * group * m.dim; i += GROUP)
                quantise_group(run.w.mixed + row * width + column + i, run.w.attended, row, (column + i) / GROUP);
    });
}

void rotate_and_cache(Walker& walker, const LayerArgs& layer, void* cache) {
    Run& run = walker.run;
    const ModelArgs& m = run.m;
    const StepArgs& s = run.s;
    const RopeJob job{run.w.qkv, s.positions, s.slots, m.cos, m.sin, run.w.q, m.heads, m.kv_heads, m.dim, m.half, m.interleaved != 0};
    walker.each(s.tokens, chunk_of(s.tokens, walker.threads), [&](int64_t t) {
        float* row = run.w.qkv + t * (m.heads + 2 * m.kv_heads) * m.dim;
        if (layer.query_norm)
            for (int64_t h = 0; h < m.heads + m.kv_heads; ++h)
                normalise(row + h * m.dim, nullptr, h < m.heads ? layer.query_norm : layer.key_norm, row + h * m.dim, m.dim, (float)m.eps);
        if (s.is_bf16)
            rope_token(job, (uint16_t*)cache, s.block_stride, s.block_size, t);
        else
            rope_token(job, (float*)cache, s.block_stride, s.block_size, t);
    });
}

void layer_phases(Walker& walker, const LayerArgs& layer, int64_t index) {
    Run& run = walker.run;
    const ModelArgs& m = run.m;
    const Workspace& w = run.w;
    const int64_t tokens = run.s.tokens, row_chunk = chunk_of(tokens, walker.threads);
    void* cache = (char*)run.s.cache + index * run.s.layer_stride * (run.s.is_bf16 ? 2 : 4);
    walker.each(tokens, row_chunk, [&](int64_t t) { norm_row(run, layer.input_norm, t, t); });
    product(walker, layer.qkv, w.x, nullptr, tokens, 1, Store<false>{layer.qkv, w.qkv});
    rotate_and_cache(walker, layer, cache);
    attention(walker, layer, cache);
    product(walker, layer.output, w.attended, nullptr, tokens, 1, Store<true>{layer.output, w.residual});
    walker.each(tokens, row_chunk, [&](int64_t t) { norm_row(run, layer.post_norm, t, t); });
    const Rows* rest = layer.fine_down ? &w.rest : nullptr;
    product(walker, layer.gate_up, w.x, nullptr, tokens, 2, Gate{layer.gate_up, w.inner, rest, {}});
    product(walker, layer.down, w.inner, rest, tokens, 1, Store<true>{layer.down, w.residual});
}

void walk(Run& run, int threads) {
    Walker walker{run, threads};
    const ModelArgs& m = run.m;
    const StepArgs& s = run.s;
    walker.each(s.tokens, chunk_of(s.tokens, threads), [&](int64_t t) { embed(m, s.token_ids[t], run.w.residual + t * m.hidden); });
    for (int64_t i = 0; i < m.num_layers; ++i) layer_phases(walker, m.layers[i], i);
    if (s.num_rows == 0) return;
    walker.each(s.num_rows, 1, [&](int64_t r) { norm_row(run, m.final_norm, s.rows[r], r); });
    product(walker, m.head, run.w.x, nullptr, s.num_rows, 1, Store<false>{m.head, s.logits});
}

// Padding between the last column and padded(k): never written by phases that quantise group by group.
void clear_padding(const Rows& rows, int64_t count, int64_t k) {
    for (int64_t g = k / GROUP; g < rows.width / GROUP; ++g)
        for (int64_t r = 0; r < count; ++r) {
            std::memset(rows.codes + r * rows.width + g * GROUP, 0, GROUP);
            const int64_t at = r * (rows.width / GROUP) + g;
            rows.scales[at] = 0.0f, rows.minus8[at] = 0, rows.sums[at] = 0;
        }
}

// 0: fine; 1: a token id, 2: a position or slot, 3: a sampled row, 4: a sequence is out of range.
int64_t check_step(const ModelArgs& m, const StepArgs& s, const AttentionCall& call) {
    for (int64_t t = 0; t < s.tokens; ++t) {
        if (s.token_ids[t] < 0 || s.token_ids[t] >= m.vocabulary) return 1;
        if (s.positions[t] < 0 || s.positions[t] >= m.max_positions) return 2;
        if (s.slots[t] < 0 || s.slots[t] >= s.num_blocks * s.block_size) return 2;
    }
    for (int64_t r = 0; r < s.num_rows; ++r)
        if (s.rows[r] < 0 || s.rows[r] >= s.tokens) return 3;
    return find_bad_sequence(call, s.sequences, s.tokens) >= 0 ? 4 : 0;
}

}  // namespace

extern "C" {

int64_t tandem_step_workspace(const ModelArgs* m, int64_t tokens, int64_t num_rows) {
    return (int64_t)(Workspace(*m, tokens, num_rows, nullptr).end - (char*)nullptr);
}

// Runs a step; returns `check_step`'s answer, and unless it is 0 nothing was written.
int64_t tandem_step(const ModelArgs* model, const StepArgs* step) {
    const ModelArgs& m = *model;
    const StepArgs& s = *step;
    const AttentionCall call{nullptr,   nullptr, nullptr,      s.tables,     s.query_starts, s.context_lens, m.heads,
                             m.kv_heads, m.dim,   s.num_blocks, s.block_size, s.block_stride, s.table_stride, 0, 1.0f};
    if (const int64_t bad = check_step(m, s, call)) return bad;
    Run run(m, s);
    // One thread for all heads of a sequence, unless that leaves threads without work.
    const bool together = s.is_bf16 && bf16_attention_fits(m.dim) && m.heads <= GROUP_ROWS && s.sequences >= 2 * s.threads;
    list_tasks(call, s.sequences, together, run.tasks);
    clear_padding(run.w.attended, s.tokens, m.heads * m.dim);
    clear_padding(run.w.inner, s.tokens, m.inner);
    clear_padding(run.w.rest, s.tokens, m.inner);
#ifdef _OPENMP
#pragma omp parallel num_threads((int)s.threads)
    walk(run, omp_get_num_threads());
#else
    walk(run, 1);
#endif
    return 0;
}
}
