// A whole step of a transformer with int8 products: embedding to logits in one parallel region; see kernels/step.py.
//
// Phases, each begun when all tasks of the one before are done: norm (and quantise) -> q, k, v -> rotate and cache -> attend (and quantise) -> output product, added
// to the residual -> norm -> gate and up, silu, quantise -> down product, added to the residual. Threads take tasks of a phase one by
// one. A row goes through the same operations in the same order whatever the other rows, the tiles and the threads are.

#include <sched.h>
#include <sys/resource.h>

#include <vector>

#include "activation.h"
#include "attention_bf16.h"
#include "int8_tiles.h"
#include "norm.h"
#include "rope.h"
#include "step.h"

using namespace tandem;

namespace {

// The next task of a range that nobody has taken.
struct Range {
    alignas(64) std::atomic<int64_t> next{0};
};

// A phase's tasks: threads take them one after another, and the phase is over when all are done, whoever did them. A thread that other
// processes keep from its core holds up nobody as long as it holds no task; when it is back it runs through what was done without it.
struct Phase {
    alignas(64) std::atomic<int64_t> done{0};

    // Waits spin a while, since phases are short, then let others run.
    void finish(int64_t mine, int64_t count) {
        if (mine > 0) done.fetch_add(mine, std::memory_order_acq_rel);
        for (int spins = 0; done.load(std::memory_order_acquire) < count; ++spins) {
            if (spins < 4000) {
#if defined(__SSE__)
                _mm_pause();
#endif
            } else {
                sched_yield();
            }
        }
    }
};

// Whether others want this process's cores: asked once a step and thread.
class Crowd {
public:
    // True while somebody does, and some steps longer.
    static bool here() { return steps_left.load(std::memory_order_relaxed) > 0; }
    // Once a step, by the thread that began it.
    static void step_began() {
        const int left = steps_left.load(std::memory_order_relaxed);
        if (left > 0) steps_left.store(left - 1, std::memory_order_relaxed);
    }
    // By each thread at its end of the step.
    static void step_ended() {
#ifdef RUSAGE_THREAD
        thread_local long before = 0;
        struct rusage usage;
        if (getrusage(RUSAGE_THREAD, &usage) != 0) return;
        if (usage.ru_nivcsw != before) steps_left.store(STEPS, std::memory_order_relaxed);
        before = usage.ru_nivcsw;
#endif
    }

private:
    static constexpr int STEPS = 16;
    static std::atomic<int> steps_left;
};

std::atomic<int> Crowd::steps_left{0};

// Memory for `rows` quantised rows of `width`, cut from a cursor.
Rows take_rows(char*& at, int64_t rows, int64_t width) {
    const auto take = [&](int64_t bytes) {
        char* start = at;
        at += (bytes + 63) / 64 * 64;
        return start;
    };
    const int64_t groups = int8_tiles(rows) * INT8_ROWS * (width / GROUP);
    Rows out{};
    out.width = width;
    if (Tiles::used()) {
        out.codes = (int8_t*)take(held_rows(rows) * width);
        out.rest = (int8_t*)take(held_rows(rows) * width);
        out.scales = (float*)take(rows * 4);
        return out;
    }
    out.codes = (int8_t*)take(rows * width);
    out.scales = (float*)take(groups * 4);
    out.minus8 = (int32_t*)take(groups * 4);
    out.sums = (uint16_t*)take(groups * 2);
    return out;
}

float* take_floats(char*& at, int64_t count) {
    char* start = at;
    at += (count * 4 + 63) / 64 * 64;
    return (float*)start;
}

struct Workspace {
    float *residual, *qkv, *q, *mixed, *gated;  // gated: where rows are quantised whole
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
        gated = take_floats(at, Tiles::used() ? tokens * m.inner : 0);
        x = take_rows(at, rows, padded(m.hidden));
        attended = take_rows(at, tokens, padded(m.heads * m.dim));
        inner = take_rows(at, tokens, padded(m.inner));
        rest = take_rows(at, Tiles::used() ? 0 : tokens, padded(m.inner));
        end = at;
    }
};

// The largest of the columns that a thread saw of a row, by lanes: column 16 * i + lane.
struct Largest {
    float value[16];
    int32_t column[16], odd[16];  // odd: not 0 once a NaN was seen

    void clear() {
        for (int l = 0; l < 16; ++l) value[l] = -INFINITY, column[l] = 0, odd[l] = 0;
    }
    // Columns come in rising order, so that the first of equals stays.
    void add(const float* x, int64_t first, int64_t count) {
        for (int l = 0; l < count; ++l) {
            const bool more = x[l] > value[l];
            odd[l] |= x[l] != x[l];
            value[l] = more ? x[l] : value[l];
            column[l] = more ? (int32_t)first + l : column[l];
        }
    }
    void merge(const Largest& other) {
        for (int l = 0; l < 16; ++l) {
            odd[l] |= other.odd[l];
            if (other.value[l] < value[l] || (other.value[l] == value[l] && other.column[l] > column[l])) continue;
            value[l] = other.value[l], column[l] = other.column[l];
        }
    }
    // The first column of the largest value; -1 when there is a NaN or an infinity, or nothing above one.
    int64_t pick() const {
        float top = -INFINITY;
        int64_t first = -1;
        for (int l = 0; l < 16; ++l) {
            if (odd[l]) return -1;
            if (value[l] > top || (value[l] == top && column[l] < first)) top = value[l], first = column[l];
        }
        return top < INFINITY && top > -INFINITY ? first : -1;
    }
};

constexpr int64_t OWN_ROWS = 64;  // a thread

struct Run {
    const ModelArgs& m;
    const StepArgs& s;
    Workspace w;
    std::vector<AttentionTask> tasks;
    // Of many rows each thread begins with its own, in all phases: what a row became is still in that core's cache, and comes from the
    // other's far more slowly than weights, which both then read, from the memory they share. Worth it where products don't take longer.
    const bool own_rows;
    std::vector<Phase> phases;
    std::vector<Range> ranges;     // [phases][threads]
    std::vector<Largest> largest;  // [threads][num_rows], when some rows are greedy
    const bool crowded = Crowd::here();

    Run(const ModelArgs& model, const StepArgs& step)
        : m(model),
          s(step),
          w(model, step.tokens, step.num_rows, (char*)step.workspace),
          own_rows(Tiles::used() && step.tokens >= OWN_ROWS * step.threads),
          phases((size_t)(10 * model.num_layers + 3)),
          ranges(phases.size() * (size_t)step.threads) {
        if (step.greedy) largest.resize((size_t)(step.threads * step.num_rows));
        for (Largest& each : largest) each.clear();
    }
};

// One thread's way through the step: the phases it has left behind.
struct Walker {
    Run& run;
    int threads, me;
    int64_t phase = 0;

    // body(task) for the tasks of this phase that nobody has taken, `chunk` at a time; then waits for the others. With several `parts` tasks are
    // cut into as many: a thread begins with its own one.
    template <class Body>
    void each(int64_t count, int64_t chunk, int64_t parts, const Body& body) {
        Phase& now = run.phases[(size_t)phase];
        Range* ranges = &run.ranges[(size_t)(phase++ * threads)];
        if (run.crowded) sched_yield();  // better here than in the middle of a task, for which everybody would have to wait
        int64_t mine = 0;
        for (int64_t i = 0; i < parts; ++i) {
            const int64_t part = (me + i) % parts, start = count * part / parts, stop = count * (part + 1) / parts;
            const auto take = [&] { return start + ranges[part].next.fetch_add(chunk, std::memory_order_relaxed); };
            for (int64_t begin = take(); begin < stop; begin = take())
                for (int64_t task = begin; task < begin + chunk && task < stop; ++task, ++mine) body(task);
        }
        now.finish(mine, count);
    }
    // The same for tasks in the order of rows.
    template <class Body>
    void each(int64_t count, int64_t chunk, const Body& body) {
        each(count, chunk, run.own_rows ? threads : 1, body);
    }
};

int64_t chunk_of(int64_t tasks, int threads) {
    const int64_t chunk = tasks / (threads * 8);
    return chunk < 1 ? 1 : chunk;
}

void embed(const ModelArgs& m, int64_t id, float* out) {
    if (m.table == nullptr) {
        weight_row(m.head, id, out);
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
    quantise(normed, run.m.hidden, run.w.x, to);
}

// Blocks of rows and panels of columns as tasks; finish(row, rows, panel, c) gets each tile's sums c[rows][32].
template <class Finish>
void product(Walker& walker, const Matrix& matrix, const Rows& x, const Rows* more, int64_t rows, int64_t panels_a_task, const Finish& finish) {
    const int64_t panels = (matrix.n + COLUMNS - 1) / COLUMNS, column_tasks = (panels + panels_a_task - 1) / panels_a_task;
    // Few columns for many threads: rows are split too. Each block of rows reads the weights anew.
    const int64_t tiles = int8_tiles(rows);
    const bool own = walker.run.own_rows && tiles >= 2 * walker.threads;
    int64_t blocks = own ? walker.threads : 1;
    const auto cut = [&](int64_t block) { return block == blocks ? tiles : tiles * block / blocks / 2 * 2; };  // AMX tiles hold two
    while (!own && column_tasks * blocks < walker.threads * 4 && tiles / (blocks + 1) >= 4) ++blocks;
    // Quantised columns of a row share cache lines: there each thread keeps to one run of columns, unless others want its core (with tiles
    // they are quantised afterwards). Else runs are short, for balance, but not so short that most panels which were asked for ahead are
    // another thread's.
    const int64_t run = chunk_of(column_tasks, walker.threads), least = column_tasks / walker.threads >= 6 ? 3 : 1;
    const int64_t share = (column_tasks + walker.threads - 1) / walker.threads;
    const int64_t chunk = panels_a_task > 1 && !Tiles::used() ? (walker.run.crowded ? (share + 3) / 4 : share) : run < least ? least : run;
    walker.each(column_tasks * blocks, blocks == 1 || own ? chunk : 1, own ? blocks : 1, [&](int64_t task) {
        const int64_t block = own ? task / column_tasks : task % blocks, panel = (own ? task % column_tasks : task / blocks) * panels_a_task;
        const int64_t begin = cut(block), end = cut(block + 1);
        int8_product(matrix, panel, panel + panels_a_task < panels ? panel + panels_a_task : panels, x, more, rows, begin, end, finish);
    });
}

// Sums (and bias) stored to out[row][n], or added to it.
template <bool ADD>
struct Store {
    const Matrix& matrix;
    float* out;
    void operator()(int64_t row, int64_t rows, int64_t panel, const float* c) const {
        for (int64_t r = 0; r < rows; ++r) one(row + r, panel, c + r * COLUMNS);
    }
#if TANDEM_TILES
    static constexpr bool TAKES_ROWS = true;
    void row(int64_t row, int64_t panel, __m512 first, __m512 second) const {
        alignas(64) float c[COLUMNS];
        if (matrix.bias || (panel + 1) * COLUMNS > matrix.n) {
            _mm512_store_ps(c, first);
            _mm512_store_ps(c + 16, second);
            return one(row, panel, c);
        }
        float* to = out + row * matrix.n + panel * COLUMNS;
        _mm512_storeu_ps(to, ADD ? _mm512_add_ps(_mm512_loadu_ps(to), first) : first);
        _mm512_storeu_ps(to + 16, ADD ? _mm512_add_ps(_mm512_loadu_ps(to + 16), second) : second);
    }
#endif
    void one(int64_t row, int64_t panel, const float* from) const {
        const int64_t column = panel * COLUMNS, columns = matrix.n - column < COLUMNS ? matrix.n - column : COLUMNS;
        float* to = out + row * matrix.n + column;
        if (columns == COLUMNS && !matrix.bias) {
            for (int64_t j = 0; j < COLUMNS; j += VW) store(to + j, ADD ? load(to + j) + load(from + j) : load(from + j));
            return;
        }
        for (int64_t j = 0; j < columns; ++j) {
            const float value = matrix.bias ? from[j] + matrix.bias[column + j] : from[j];
            to[j] = ADD ? to[j] + value : value;
        }
    }
};

// Logits: stored, or of greedy rows only the largest kept, so that megabytes are neither written nor read again.
struct Predict {
    const StepArgs& s;
    Store<false> logits;
    Largest* largest;  // this thread's
    void operator()(int64_t row, int64_t rows, int64_t panel, float* c) const {
        const Matrix& head = logits.matrix;
        const int64_t column = panel * COLUMNS, columns = head.n - column < COLUMNS ? head.n - column : COLUMNS;
        for (int64_t r = 0; r < rows; ++r, c += COLUMNS) {
            if (!s.greedy || !s.greedy[row + r]) {
                logits.one(row + r, panel, c);
                continue;
            }
            for (int64_t j = 0; head.bias && j < columns; ++j) c[j] += head.bias[column + j];
            for (int64_t j = 0; j < columns; j += 16) largest[row + r].add(c + j, column + j, columns - j < 16 ? columns - j : 16);
        }
    }
};

// Panels of gate and up columns -> silu(gate) * up, quantised as a group of w.inner once two panels are there.
struct Gate {
    const Matrix& matrix;
    const Rows &inner, *rest;
    float* gated;  // where rows are quantised whole, afterwards
    alignas(64) mutable float group[INT8_ROWS][GROUP];
#if TANDEM_TILES
    static constexpr bool TAKES_ROWS = true;
    void row(int64_t row, int64_t panel, __m512 gate, __m512 up) const {
        if (matrix.bias) {
            gate = _mm512_add_ps(gate, _mm512_loadu_ps(matrix.bias + panel * COLUMNS));
            up = _mm512_add_ps(up, _mm512_loadu_ps(matrix.bias + panel * COLUMNS + 16));
        }
        _mm512_storeu_ps(gated + row * matrix.n / 2 + panel * 16, (__m512)silu_mul((vf)gate, (vf)up));
    }
#endif
    void operator()(int64_t row, int64_t rows, int64_t panel, const float* c) const {
        const int64_t half = panel % 2 * 16;
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t j = 0; j < 16; j += VW) {
                vf gate = load(c + r * COLUMNS + j), up = load(c + r * COLUMNS + 16 + j);
                if (matrix.bias) {
                    gate = gate + load(matrix.bias + panel * COLUMNS + j);
                    up = up + load(matrix.bias + panel * COLUMNS + 16 + j);
                }
                store((gated ? gated + (row + r) * matrix.n / 2 + panel * 16 : group[r] + half) + j, silu_mul(gate, up));
            }
            if (half == 0 || gated) continue;
            quantise_group(group[r], inner, row + r, panel / 2);
            if (rest) quantise_rest(group[r], inner, *rest, row + r, panel / 2);
        }
    }
};

// Where a layer's keys and values are.
KvBlocks blocks_of(const StepArgs& s, const LayerArgs& layer) {
    return {(char*)s.cache + layer.cache_layer * s.layer_stride * element_bytes(s.format),
            s.scales ? s.scales + layer.cache_layer * s.scales_layer_stride : nullptr,
            s.block_stride, s.scales_block_stride, s.block_size, s.format, s.paired != 0, layer.key_scale, layer.value_scale};
}

void attention(Walker& walker, const LayerArgs& layer, const KvBlocks& blocks) {
    Run& run = walker.run;
    const ModelArgs& m = run.m;
    const StepArgs& s = run.s;
    const int64_t width = m.heads * m.dim, group = m.heads / m.kv_heads;
    const AttentionCall call{run.w.q,  run.w.mixed, blocks.cache, s.tables,     s.query_starts, s.context_lens, m.heads,
                             m.kv_heads, m.dim,     s.num_blocks, s.block_size, s.block_stride, s.table_stride, layer.window,
                             1.0f / std::sqrt((float)m.dim), blocks.paired, blocks.format, blocks.scales, blocks.scales_stride};
    walker.each((int64_t)run.tasks.size(), 1, [&](int64_t number) {
        const AttentionTask& task = run.tasks[run.own_rows ? run.tasks.size() - 1 - (size_t)number : (size_t)number];  // the last ones are first
        attend(call, task, true);
        const int64_t first = s.query_starts[task.sequence] + task.query, column = task.kv_head * group * m.dim;
        if (run.w.attended.rest) return;
        for (int64_t row = first; row < first + task.count; ++row)
            for (int64_t i = 0; i < task.kv_heads * group * m.dim; i += GROUP)
                quantise_group(run.w.mixed + row * width + column + i, run.w.attended, row, (column + i) / GROUP);
    });
}

void rotate_and_cache(Walker& walker, const LayerArgs& layer, const KvBlocks& blocks) {
    Run& run = walker.run;
    const ModelArgs& m = run.m;
    const StepArgs& s = run.s;
    const RopeJob job{run.w.qkv, s.positions, s.slots, m.cos, m.sin, run.w.q, m.heads, m.kv_heads, m.dim, m.half, m.interleaved != 0};
    walker.each(s.tokens, chunk_of(s.tokens, walker.threads), [&](int64_t t) {
        float* row = run.w.qkv + t * (m.heads + 2 * m.kv_heads) * m.dim;
        if (layer.query_norm)
            for (int64_t h = 0; h < m.heads + m.kv_heads; ++h)
                normalise(row + h * m.dim, nullptr, h < m.heads ? layer.query_norm : layer.key_norm, row + h * m.dim, m.dim, (float)m.eps);
        rope_token(job, blocks, t);
    });
}

void layer_phases(Walker& walker, const LayerArgs& layer) {
    Run& run = walker.run;
    const ModelArgs& m = run.m;
    const Workspace& w = run.w;
    const int64_t tokens = run.s.tokens, row_chunk = chunk_of(tokens, walker.threads);
    const bool whole = w.inner.rest != nullptr;  // rows are quantised whole, not group by group where they are made
    const KvBlocks blocks = blocks_of(run.s, layer);
    walker.each(tokens, row_chunk, [&](int64_t t) { norm_row(run, layer.input_norm, t, t); });
    product(walker, layer.qkv, w.x, nullptr, tokens, 1, Store<false>{layer.qkv, w.qkv});
    rotate_and_cache(walker, layer, blocks);
    attention(walker, layer, blocks);
    if (whole) walker.each(tokens, row_chunk, [&](int64_t t) { quantise(w.mixed + t * m.heads * m.dim, m.heads * m.dim, w.attended, t); });
    product(walker, layer.output, w.attended, nullptr, tokens, 1, Store<true>{layer.output, w.residual});
    walker.each(tokens, row_chunk, [&](int64_t t) { norm_row(run, layer.post_norm, t, t); });
    const Rows* rest = layer.fine_down && !whole ? &w.rest : nullptr;
    product(walker, layer.gate_up, w.x, nullptr, tokens, 2, Gate{layer.gate_up, w.inner, rest, whole ? w.gated : nullptr, {}});
    if (whole) walker.each(tokens, row_chunk, [&](int64_t t) { quantise(w.gated + t * m.inner, m.inner, w.inner, t); });
    product(walker, layer.down, w.inner, rest, tokens, 1, Store<true>{layer.down, w.residual});
}

void walk(Run& run, int threads, int me) {
    Walker walker{run, threads, me};
    const ModelArgs& m = run.m;
    const StepArgs& s = run.s;
    walker.each(s.tokens, chunk_of(s.tokens, threads), [&](int64_t t) { embed(m, s.token_ids[t], run.w.residual + t * m.hidden); });
    for (int64_t i = 0; i < m.num_layers; ++i) layer_phases(walker, m.layers[i]);
    if (s.num_rows == 0) return;
    walker.each(s.num_rows, 1, [&](int64_t r) { norm_row(run, m.final_norm, s.rows[r], r); });
    Largest* largest = s.greedy ? run.largest.data() + walker.me * s.num_rows : nullptr;
    product(walker, m.head, run.w.x, nullptr, s.num_rows, 1, Predict{s, {m.head, s.logits}, largest});
    if (!s.greedy || walker.me != 0) return;
    for (int64_t r = 0; r < s.num_rows; ++r) {
        for (int t = 1; t < walker.threads; ++t) largest[r].merge(run.largest[(size_t)(t * s.num_rows + r)]);
        if (s.greedy[r]) s.best[r] = largest[r].pick();
    }
}

// Padding between the last column and padded(k): never written by phases that quantise group by group.
void clear_padding(const Rows& rows, int64_t count, int64_t k) {
    for (int64_t g = k / GROUP; g < rows.width / GROUP; ++g)
        for (int64_t r = 0; r < count; ++r) {
            std::memset(rows.codes + r * rows.width + g * GROUP, 0, GROUP);
            const int64_t at = rows.at(r, g);
            rows.scales[at] = 0.0f, rows.minus8[at] = 0, rows.sums[rows.sum_at(r, g)] = 0;
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

void tandem_want_tiles(int32_t tiles) { Tiles::want(tiles != 0); }

int64_t tandem_step_workspace(const ModelArgs* m, int64_t tokens, int64_t num_rows) {
    return (int64_t)(Workspace(*m, tokens, num_rows, nullptr).end - (char*)nullptr);
}

// Runs a step; returns `check_step`'s answer, and unless it is 0 nothing was written.
int64_t tandem_step(const ModelArgs* model, const StepArgs* step) {
    const ModelArgs& m = *model;
    const StepArgs& s = *step;
    const AttentionCall call{nullptr,   nullptr, nullptr,      s.tables,     s.query_starts, s.context_lens, m.heads,
                             m.kv_heads, m.dim,   s.num_blocks, s.block_size, s.block_stride, s.table_stride, 0, 1.0f, s.paired != 0,
                             s.format, s.scales, s.scales_block_stride};
    if (const int64_t bad = check_step(m, s, call)) return bad;
    Run run(m, s);
    // One thread for all heads of a sequence, unless that leaves threads without work.
    const bool together = s.format != KV_FLOAT32 && bf16_attention_fits(m.dim) && m.heads <= GROUP_ROWS && s.sequences >= 2 * s.threads;
    list_tasks(call, s.sequences, together, run.tasks);
    if (!run.w.x.rest) {
        clear_padding(run.w.attended, s.tokens, m.heads * m.dim);
        clear_padding(run.w.inner, s.tokens, m.inner);
        clear_padding(run.w.rest, s.tokens, m.inner);
    }
#ifdef _OPENMP
    Crowd::step_began();
#pragma omp parallel num_threads((int)s.threads)
    {
        walk(run, omp_get_num_threads(), omp_get_thread_num());
        Crowd::step_ended();
    }
#else
    walk(run, 1, 0);
#endif
    return 0;
}
}
