// What every CPU kernel shares: one SIMD vector type, one exp, bf16 conversion, and a parallel loop.
//
// Exactness: the files are compiled with -ffp-contract=off and fuse only through `fma` below, so each output element goes through
// the same operations whatever the tile, the row count or the thread. Reductions over lanes use one fixed tree.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__SSE__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace tandem {

#if defined(__AVX512F__)
constexpr int VW = 16;  // floats in a vector
#elif defined(__AVX__)
constexpr int VW = 8;
#else
constexpr int VW = 4;
#endif

typedef float vf __attribute__((vector_size(VW * 4), aligned(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4), aligned(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4), aligned(VW * 4)));

static inline vf splat(float value) {
#if defined(__AVX512F__)
    return (vf)_mm512_set1_ps(value);
#elif defined(__AVX__)
    return (vf)_mm256_set1_ps(value);
#elif defined(__SSE__)
    return (vf)_mm_set1_ps(value);
#elif defined(__ARM_NEON)
    return (vf)vdupq_n_f32(value);
#else
    vf out;
    for (int i = 0; i < VW; ++i) out[i] = value;
    return out;
#endif
}

static inline vf load(const float* p) {
    vf out;
    std::memcpy(&out, p, sizeof out);
    return out;
}

static inline void store(float* p, vf value) { std::memcpy(p, &value, sizeof value); }

// First `count` lanes from memory, the rest 0; reads nothing beyond. 0 <= count <= VW.
static inline vf load_part(const float* p, int count) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1u), p);
#else
    alignas(64) float lanes[VW] = {};
    std::memcpy(lanes, p, (size_t)count * 4);
    return load(lanes);
#endif
}

static inline void store_part(float* p, vf value, int count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1u), (__m512)value);
#else
    std::memcpy(p, &value, (size_t)count * 4);
#endif
}

// a * b + c: one rounding where the machine has FMA, two everywhere else; the same for every caller on one machine.
static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

static inline vf select(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
static inline vf max(vf a, vf b) { return select(a > b, a, b); }

// Lane sums and maxima by one fixed tree of halves.
static inline float sum_lanes(vf value) {
    alignas(64) float lanes[VW];
    store(lanes, value);
    for (int half = VW / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = lanes[i] + lanes[i + half];
    return lanes[0];
}

static inline float max_lanes(vf value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)value);
#else
    float best = value[0];
    for (int i = 1; i < VW; ++i) best = value[i] > best ? value[i] : best;
    return best;
#endif
}

static inline vf round_nearest(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves no fraction bits; |x| < 2^22 here
    return (x + magic) - magic;
#endif
}

// e^x, error under 2 units in the last place on [-87, 88]; 0 for -inf, inf above 88.8, NaN for NaN.
// Cody-Waite reduction and the degree-6 polynomial of Cephes' expf. Used everywhere, so that no two paths differ.
static inline vf exp(vf x) {
#if defined(__AVX512F__)
    // The bounds come first: of a NaN and a number, the instruction keeps the second.
    const vf clamped = (vf)_mm512_max_ps(_mm512_set1_ps(-110.0f), _mm512_min_ps(_mm512_set1_ps(100.0f), (__m512)x));
#else
    const vf high = splat(88.72283f), low = splat(-87.33654f);
    const vf clamped = select(x > high, high, select(x < low, low, x));
#endif
    const vf n = round_nearest(clamped * splat(1.44269504088896341f));
    vf r = fma(n, splat(-0.693359375f), clamped);
    r = fma(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    // 2^n in two factors: n may be 128, whose single factor would be infinite. A NaN's n is replaced by 0.
    const vi whole = __builtin_convertvector(select(x == x, n, splat(0.0f)), vi);
    const vi first = whole >> 1, second = whole - first;
    const vf scaled = p * (vf)((first + 127) << 23) * (vf)((second + 127) << 23);
    const vf bounded = select(x > high, splat(INFINITY), select(x < low, splat(0.0f), scaled));
    return select(x == x, bounded, x);
#endif
}

static inline float bf16_to_float(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}

static inline float half_to_float(uint16_t bits) {
#if defined(__F16C__)
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
#else
    const uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, fraction = bits & 0x3FFu;
    if (exponent == 0) {
        const float value = (float)fraction * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -value : value;
    }
    const uint32_t wide = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112u) << 23) | fraction << 13;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
#endif
}

// Round to nearest even, as torch does; a NaN stays a NaN.
static inline uint16_t float_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)(value != value ? 0x7FC0u : rounded);
}

static inline int worker_count(int threads, int64_t tasks) {
#ifdef _OPENMP
    return (int)(tasks < threads ? tasks : threads);
#else
    (void)threads;
    (void)tasks;
    return 1;
#endif
}

// body(begin, end) over [0, tasks) in one contiguous run a thread. Which thread does what never changes a result.
template <class Body>
static inline void parallel_static(int threads, int64_t tasks, const Body& body) {
    const int workers = worker_count(threads, tasks);
    if (workers <= 1) {
        if (tasks > 0) body((int64_t)0, tasks);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(workers)
    {
        const int64_t count = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t begin = tasks * me / count, end = tasks * (me + 1) / count;
        if (begin < end) body(begin, end);
    }
#endif
}

// body(task) for each task, taken one by one: for tasks of unequal cost.
template <class Body>
static inline void parallel_dynamic(int threads, int64_t tasks, const Body& body) {
    const int workers = worker_count(threads, tasks);
    if (workers <= 1) {
        for (int64_t task = 0; task < tasks; ++task) body(task);
        return;
    }
#ifdef _OPENMP
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(workers)
    for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) body(task);
#endif
}

}  // namespace tandem
