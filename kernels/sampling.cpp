// Drawing tokens from logits; see kernels/sampling.py for the semantics. One draw depends on its own row and settings only.

#include "common.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <vector>

using namespace tandem;

namespace {

constexpr float NEG_INF = -std::numeric_limits<float>::infinity();
enum Failure : int32_t { NOT_FINITE = -1, BAD_ID = -2, ALL_BANNED = -3, SKIPPED = -4 };  // in place of a token

// One draw's settings, as numpy lays them out (kernels/sampling.py, DRAW_DTYPE).
struct Draw {
    int64_t row;
    double temperature, top_p, min_p, repetition, presence, frequency;
    uint64_t key;
    int64_t seen_begin, prompt_end, output_end;  // token ids [seen_begin, prompt_end) and [prompt_end, output_end)
    int64_t bias_begin, bias_end;
    int64_t suppress_begin, suppress_end;
    int32_t top_k;
    int32_t logprobs;  // -1: none
    int64_t first;     // the draw with which its run begins: itself, unless it follows others
    int64_t expects;   // what must be drawn here for the next of the run to count
};

struct Lists {
    const int32_t* seen;
    const int32_t* bias_ids;
    const double* bias_values;
    const int32_t* suppress;
};

struct Candidate {
    float logit;
    int32_t id;
};

// The order of all truncation: likelier first, the lower id first among equals.
inline bool before(const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// What a thread keeps between draws, so that a draw allocates nothing.
struct Scratch {
    std::vector<float> logits, weights, maxima;
    std::vector<int32_t> counts;
    std::vector<Candidate> order;
};

inline uint64_t mix(uint64_t z) {  // SplitMix64's finalizer (Steele, Lea, Flood 2014)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// Uniform on (0, 1), 52 bits, from the draw's key and the token id: never 0, never 1, exact in double.
inline double uniform(uint64_t key, int64_t id) {
    const uint64_t bits = mix(key + (uint64_t)(id + 1) * 0x9E3779B97F4A7C15ull);
    return ((double)(int64_t)(bits >> 12) + 0.5) * 0x1p-52;
}

inline double gumbel(uint64_t key, int64_t id) { return -std::log(-std::log(uniform(key, id))); }

// Largest logit; NaN when there is a NaN or +inf, or when all are -inf.
float finite_max(const float* x, int64_t n) {
    vf best = splat(NEG_INF);
    vi bad = (vi)splat(0.0f);
    int64_t i = 0;
    for (; i + VW <= n; i += VW) {
        const vf v = load(x + i);
        bad |= (v != v);
        best = max(v, best);
    }
    float top = max_lanes(best);
    bool wrong = false;
    for (int lane = 0; lane < VW; ++lane) wrong |= bad[lane] != 0;
    for (; i < n; ++i) {
        wrong |= x[i] != x[i];
        top = x[i] > top ? x[i] : top;
    }
    return wrong || top == NEG_INF || top == -NEG_INF ? std::numeric_limits<float>::quiet_NaN() : top;
}

// Lowest id among the largest.
int64_t first_equal(const float* x, int64_t n, float value) {
    int64_t i = 0;
    for (; i + 8 * VW <= n; i += 8 * VW) {
        vi hit = load(x + i) == splat(value);
        for (int v = 1; v < 8; ++v) hit |= load(x + i + v * VW) == splat(value);
        int32_t any = 0;
        for (int lane = 0; lane < VW; ++lane) any |= hit[lane];
        if (any) break;
    }
    while (i < n && x[i] != value) ++i;
    return i < n ? i : -1;
}

// weights[i] = exp((x[i] - top) * scale); returns their sum, in one fixed order.
double exponentials(const float* x, int64_t n, float top, float scale, float* weights) {
    double total = 0.0;
    int64_t i = 0;
    while (i + VW <= n) {
        const int64_t stop = std::min(n - VW, i + 63 * VW);
        vf sum = splat(0.0f);
        for (; i <= stop; i += VW) {
            const vf w = tandem::exp((load(x + i) - splat(top)) * splat(scale));
            store(weights + i, w);
            sum = sum + w;
        }
        total += (double)sum_lanes(sum);
    }
    if (i < n) {
        const int left = (int)(n - i);
        const vf w = tandem::exp((load_part(x + i, left) - splat(top)) * splat(scale));
        store_part(weights + i, w, left);
        for (int lane = 0; lane < left; ++lane) total += (double)weights[i + lane];
    }
    return total;
}

// The edited logit. A tiny repetition penalty must not make an infinity; what the model rules out (-inf) stays out.
inline float edited_logit(float before, double value) {
    const double limit = std::numeric_limits<float>::max();
    return before == NEG_INF ? NEG_INF : (float)std::min(std::max(value, -limit), limit);
}

void penalize(const Draw& draw, const Lists& lists, int64_t vocab, Scratch& scratch) {
    float* x = scratch.logits.data();
    scratch.counts.resize((size_t)vocab, 0);  // all zero between uses
    int32_t* counts = scratch.counts.data();
    // Bit 0 of a count: the repetition penalty was applied; the rest: occurrences in the output.
    for (int64_t i = draw.prompt_end; i < draw.output_end; ++i) counts[lists.seen[i]] += 2;
    for (int64_t i = draw.seen_begin; i < draw.output_end; ++i) {
        const int32_t id = lists.seen[i];
        if (counts[id] & 1) continue;
        const int32_t times = counts[id] / 2;
        counts[id] |= 1;
        double value = x[id];
        value = value > 0 ? value / draw.repetition : value * draw.repetition;
        if (times) value -= draw.presence + draw.frequency * times;
        x[id] = edited_logit(x[id], value);
    }
    for (int64_t i = draw.seen_begin; i < draw.output_end; ++i) counts[lists.seen[i]] = 0;
}

// All ids with least <= x[id] < below, in the order of ids.
void gather(const float* x, int64_t vocab, float least, float below, std::vector<Candidate>& out) {
    out.clear();
    const auto take = [&](int64_t id) {
        if (x[id] >= least && x[id] < below) out.push_back({x[id], (int32_t)id});
    };
    int64_t i = 0;
    for (; i + VW <= vocab; i += VW) {
        const vf v = load(x + i);
        const vi hit = (v >= splat(least)) & (v < splat(below));
        int32_t any = 0;
        for (int lane = 0; lane < VW; ++lane) any |= hit[lane];
        if (any)
            for (int lane = 0; lane < VW; ++lane) take(i + lane);
    }
    for (; i < vocab; ++i) take(i);
}

// The `count` first ids by `before`, in no order, without sorting the vocabulary: the count-th largest among the maxima of
// disjoint groups of ids is a bar that at least `count` ids reach, and few more do.
void take_top(const float* x, int64_t vocab, int64_t count, Scratch& scratch) {
    constexpr int DEPTH = 16;
    std::vector<float>& maxima = scratch.maxima;
    maxima.clear();
    int64_t i = 0;
    for (; i + DEPTH * VW <= vocab; i += DEPTH * VW) {
        vf most = load(x + i);
        for (int d = 1; d < DEPTH; ++d) most = max(load(x + i + d * VW), most);
        maxima.resize(maxima.size() + VW);
        store(maxima.data() + maxima.size() - VW, most);
    }
    maxima.insert(maxima.end(), x + i, x + vocab);
    float least = NEG_INF;
    if (count <= (int64_t)maxima.size()) {
        std::nth_element(maxima.begin(), maxima.begin() + (count - 1), maxima.end(), std::greater<float>());
        least = maxima[(size_t)count - 1];
    }
    std::vector<Candidate>& order = scratch.order;
    gather(x, vocab, least, -NEG_INF, order);
    if (count >= (int64_t)order.size()) return;
    std::nth_element(order.begin(), order.begin() + count, order.end(), before);
    order.resize((size_t)count);
}

void report_logprobs(const Draw& draw, int64_t vocab, Scratch& scratch, int32_t token, float* logprob, int32_t* ids,
                     float* values) {
    const float* x = scratch.logits.data();
    scratch.weights.resize((size_t)vocab);
    const float top = finite_max(x, vocab);
    const double norm = (double)top + std::log(exponentials(x, vocab, top, 1.0f, scratch.weights.data()));
    *logprob = (float)((double)x[token] - norm);
    if (draw.logprobs == 0) return;
    take_top(x, vocab, draw.logprobs, scratch);
    std::sort(scratch.order.begin(), scratch.order.end(), before);
    for (size_t i = 0; i < scratch.order.size(); ++i) {
        ids[i] = scratch.order[i].id;
        values[i] = (float)((double)scratch.order[i].logit - norm);
    }
}

// Keeps the token with the largest logit / temperature + Gumbel noise of all that are offered, in any order.
struct Race {
    const Draw& draw;
    const float* x;
    const float* weights;
    double inverse, floor;
    Candidate last{NEG_INF, std::numeric_limits<int32_t>::max()};  // ids behind it are out
    double best = -std::numeric_limits<double>::infinity();
    double bar = std::numeric_limits<double>::infinity();  // an id can win only if (1 - u) <= bar * weight
    int32_t winner = -1;

    void offer(int64_t id) {
        const double weight = weights[id], u = uniform(draw.key, id);
        // -log(u) >= 1 - u: the logarithms are needed only where this bound could beat the best.
        if (weight < floor || weight <= 0.0 || 1.0 - u > bar * weight || before(last, {x[id], (int32_t)id})) return;
        const double score = (double)x[id] * inverse + gumbel(draw.key, id);
        if (score < best || (score == best && id > winner)) return;
        best = score;
        winner = (int32_t)id;
        // score = log(weight) + c + g, so this is the best's exponential -log(u) / weight, a little widened for rounding.
        bar = -std::log(u) / weight * 1.001;
    }
};

// Offers all ids, passing over spans of which none can win.
void offer_all(Race& race, int64_t vocab) {
    constexpr int SPAN = 64;
    int64_t start = 0;
    for (; start + SPAN <= vocab; start += SPAN) {
        const float* weights = race.weights + start;
        const uint64_t key = race.draw.key;
        const double bar = race.bar;
        int64_t any = 0;
        for (int64_t i = 0; i < SPAN; ++i)
            any |= (int64_t)(1.0 - uniform(key, start + i) <= bar * (double)weights[i]);
        if (any)
            for (int64_t id = start; id < start + SPAN; ++id) race.offer(id);
    }
    for (; start < vocab; ++start) race.offer(start);
}

// How many of the first candidates (by `before`; they come to the front) it takes to reach `target`: halved by mass, so
// linear in their number; only the last few are sorted.
size_t take_mass(std::vector<Candidate>& list, const float* weights, double target) {
    size_t low = 0, high = list.size();
    double sum = 0.0;
    const auto at = [&](size_t place) { return list.begin() + (std::ptrdiff_t)place; };
    while (high - low > 64) {
        const size_t middle = low + (high - low) / 2;
        std::nth_element(at(low), at(middle), at(high), before);
        double half = 0.0;
        for (size_t i = low; i < middle; ++i) half += (double)weights[list[i].id];
        if (sum + half >= target) {
            high = middle;
        } else {
            sum += half;
            low = middle;
        }
    }
    std::sort(at(low), at(high), before);
    for (; low < high; ++low) {
        sum += (double)weights[list[low].id];
        if (sum >= target) return low + 1;
    }
    return high;
}

struct Share {
    double mass;
    int64_t count;
};

// The sum of the weights of all ids with x[id] >= least, in one fixed order, and their number.
Share share_above(const float* x, const float* weights, int64_t vocab, float least) {
    Share out{0.0, 0};
    int64_t i = 0;
    while (i + VW <= vocab) {
        const int64_t stop = std::min(vocab - VW, i + 63 * VW);
        vf sum = splat(0.0f);
        vi count = (vi)splat(0.0f);
        for (; i <= stop; i += VW) {
            const vi hit = load(x + i) >= splat(least);
            sum = sum + (vf)((vi)load(weights + i) & hit);
            count -= hit;
        }
        out.mass += (double)sum_lanes(sum);
        for (int lane = 0; lane < VW; ++lane) out.count += count[lane];
    }
    for (; i < vocab; ++i)
        if (x[i] >= least) out = {out.mass + (double)weights[i], out.count + 1};
    return out;
}

// The last id of the nucleus: of the fewest first ids (by `before`) whose weights reach `target`. Bars are laid through the
// logits until only a few lie between one that is too high and one that is low enough; those few are sorted.
Candidate nucleus_end(const float* x, int64_t vocab, Scratch& scratch, float top, double temperature, double target) {
    constexpr int64_t FEW = 256;
    const float* weights = scratch.weights.data();
    float high = -NEG_INF, low = NEG_INF;
    Share above{0.0, 0}, below{0.0, vocab};
    double step = 0.5 * temperature;
    for (int round = 0; round < 40 && below.count - above.count > FEW; ++round) {
        const bool down = low == NEG_INF;  // doubling steps down from the top, then halving
        const float bar = down ? (float)((double)top - step) : low + (std::min(high, top) - low) * 0.5f;
        if (!(bar > low && bar < high)) break;
        step *= 2.0;
        const Share here = share_above(x, weights, vocab, bar);
        (here.mass >= target ? low : high) = bar;
        (here.mass >= target ? below : above) = here;
    }
    gather(x, vocab, low, high, scratch.order);
    return scratch.order[take_mass(scratch.order, weights, target - above.mass) - 1];
}

// Offers what top-k and then top-p keep. `total` is the sum of all weights.
void offer_kept(Race& race, int64_t vocab, Scratch& scratch, float top, double total) {
    const Draw& draw = race.draw;
    if (draw.top_k <= 0 || draw.top_k >= vocab) {
        if (draw.top_p < 1.0)
            race.last = nucleus_end(race.x, vocab, scratch, top, 1.0 / race.inverse, draw.top_p * total);
        offer_all(race, vocab);
        return;
    }
    take_top(race.x, vocab, draw.top_k, scratch);
    std::vector<Candidate>& order = scratch.order;
    double kept = 0.0;
    for (const Candidate& item : order) kept += (double)race.weights[item.id];
    if (draw.top_p < 1.0) order.resize(take_mass(order, race.weights, draw.top_p * kept));
    for (const Candidate& item : order) race.offer(item.id);
}

int32_t draw_random(const Draw& draw, int64_t vocab, Scratch& scratch, float top) {
    scratch.weights.resize((size_t)vocab);
    const float *x = scratch.logits.data(), *weights = scratch.weights.data();
    const double inverse = std::min(1.0 / draw.temperature, 1e30);  // finite, also as a float
    const double total = exponentials(x, vocab, top, (float)inverse, scratch.weights.data());
    Race race{draw, x, weights, inverse, draw.min_p};  // the likeliest token's weight is 1
    race.offer(first_equal(x, vocab, top));             // sets a high bar for the others
    offer_kept(race, vocab, scratch, top, total);
    return race.winner;
}

bool in_vocabulary(const int32_t* ids, int64_t begin, int64_t end, int64_t vocab) {
    return std::all_of(ids + begin, ids + end, [vocab](int32_t id) { return id >= 0 && id < vocab; });
}

int32_t draw_one(const Draw& draw, const Lists& lists, const float* row, int64_t vocab, Scratch& scratch, float* logprob,
                 int32_t* ids, float* values) {
    const bool greedy = draw.temperature == 0.0;
    const bool edited = draw.output_end > draw.seen_begin || draw.bias_end > draw.bias_begin ||
                        draw.suppress_end > draw.suppress_begin;
    if (!in_vocabulary(lists.seen, draw.seen_begin, draw.output_end, vocab) ||
        !in_vocabulary(lists.bias_ids, draw.bias_begin, draw.bias_end, vocab) ||
        !in_vocabulary(lists.suppress, draw.suppress_begin, draw.suppress_end, vocab))
        return BAD_ID;
    float top = finite_max(row, vocab);
    if (top != top) return NOT_FINITE;
    if (greedy && !edited && draw.logprobs < 0) return (int32_t)first_equal(row, vocab, top);
    scratch.logits.assign(row, row + vocab);
    float* x = scratch.logits.data();
    if (edited) {
        penalize(draw, lists, vocab, scratch);
        for (int64_t i = draw.bias_begin; i < draw.bias_end; ++i) {
            float& logit = x[lists.bias_ids[i]];
            logit = edited_logit(logit, (double)logit + lists.bias_values[i]);
        }
        for (int64_t i = draw.suppress_begin; i < draw.suppress_end; ++i) x[lists.suppress[i]] = NEG_INF;
        top = finite_max(x, vocab);
        if (top != top) return ALL_BANNED;
    }
    const int32_t token = greedy ? (int32_t)first_equal(x, vocab, top) : draw_random(draw, vocab, scratch, top);
    if (draw.logprobs >= 0) report_logprobs(draw, vocab, scratch, token, logprob, ids, values);
    return token;
}

}  // namespace

extern "C" {

int64_t tandem_draw_bytes() { return (int64_t)sizeof(Draw); }

// logits [rows][vocab]; tokens, logprobs [count]; top ids and values [count][top_width]. A token below 0 is a Failure.
void tandem_draw_tokens(const float* logits, int64_t vocab, const void* draws, int64_t count, const int32_t* seen,
                        const int32_t* bias_ids, const double* bias_values, const int32_t* suppress, int32_t* tokens,
                        float* logprobs, int32_t* top_tokens, float* top_values, int64_t top_width, int32_t threads) {
    const Lists lists{seen, bias_ids, bias_values, suppress};
    std::vector<std::atomic<int64_t>> last((size_t)count);  // of a run, by its first: what lies behind counts no more
    for (auto& each : last) each.store(count, std::memory_order_relaxed);
    parallel_dynamic(threads, count, [&](int64_t i) {
        static thread_local Scratch scratch;
        const Draw& draw = ((const Draw*)draws)[i];
        std::atomic<int64_t>& end = last[(size_t)draw.first];
        if (i > end.load(std::memory_order_relaxed)) {
            tokens[i] = SKIPPED;
            return;
        }
        tokens[i] = draw_one(draw, lists, logits + draw.row * vocab, vocab, scratch, logprobs + i,
                             top_tokens + i * top_width, top_values + i * top_width);
        if (tokens[i] == draw.expects) return;
        for (int64_t now = end.load(); i < now && !end.compare_exchange_weak(now, i);) {
        }
    });
}
}
