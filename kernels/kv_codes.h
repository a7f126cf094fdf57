// The number formats of the cache: how a row of keys or values is written, and read back as floats; see kernels/kv_codes.py.
//
// Rows of 8-bit codes have a scale each, which stands behind the elements of the block. Loops over elements may be vectorised freely: no
// element depends on another but through the row's scale, which is a maximum.
#pragma once

#include <cfloat>
#include <type_traits>

#include "common.h"

namespace tandem {

enum KvFormat : int64_t { KV_FLOAT32 = 0, KV_BF16 = 1, KV_INT8 = 2, KV_E4M3 = 3 };  // kernels/kv_codes.py numbers them

struct E4m3 {
    uint8_t bits;
};

template <class T>
constexpr bool HAS_SCALES = sizeof(T) == 1;

// body(T()) with the type that holds an element of the cache: float, uint16_t (bf16 bits), int8_t or E4m3.
template <class Body>
inline void with_format(int64_t format, const Body& body) {
    switch (format) {
        case KV_BF16: return body(uint16_t());
        case KV_INT8: return body(int8_t());
        case KV_E4M3: return body(E4m3());
        default: return body(float());
    }
}

inline int64_t element_bytes(int64_t format) { return format == KV_FLOAT32 ? 4 : format == KV_BF16 ? 2 : 1; }

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// A row's scale: `fixed` when that is above 0; NaN when the row holds a NaN or an infinity.
template <class T>
inline float row_scale(const float* x, int64_t dim, float fixed) {
    uint32_t most = 0;  // of the bits of magnitudes: a NaN's are larger than any number's
    for (int64_t i = 0; i < dim; ++i) {
        const uint32_t size = bits_of(x[i]) & 0x7FFFFFFFu;
        most = size > most ? size : most;
    }
    if (most >= 0x7F800000u) return float_of(0x7FC00000u);
    if (fixed > 0.0f) return fixed;
    const float scale = float_of(most) / (std::is_same<T, int8_t>::value ? 127.0f : 448.0f);
    return scale < FLT_MIN ? 1.0f : scale;
}

inline void encode_one(float x, int8_t& out) {
    const float bounded = x < -127.0f ? -127.0f : x > 127.0f ? 127.0f : x;
    out = (int8_t)(int32_t)((bounded + 12582912.0f) - 12582912.0f);  // 1.5 * 2^23 leaves no fraction bits: rounded to nearest even
}

inline void encode_one(float x, E4m3& out) {
    const float size = float_of(bits_of(x) & 0x7FFFFFFFu), bounded = size > 448.0f ? 448.0f : size;
    const uint32_t bits = bits_of(bounded);
    // Below 2^-6 adding 2^14 rounds to a multiple of 2^-9, whose count is the code; above, the bits are rounded.
    const uint32_t small = bits_of(bounded + 16384.0f) - 0x46800000u, large = (bits - 0x3C000000u + 0x7FFFFu + ((bits >> 20) & 1u)) >> 20;
    out.bits = (uint8_t)((bits_of(x) >> 24 & 0x80u) | (bounded < 0.015625f ? small : large));
}

// A row as it is stored; `scale`, of formats that have one, gets the row's.
inline void encode_row(const float* x, int64_t dim, float, float* out, float*) { std::memcpy(out, x, (size_t)dim * 4); }

inline void encode_row(const float* x, int64_t dim, float, uint16_t* out, float*) {
    for (int64_t i = 0; i < dim; ++i) out[i] = float_to_bf16(x[i]);
}

template <class T>
inline void encode_row(const float* x, int64_t dim, float fixed, T* out, float* scale) {
    *scale = row_scale<T>(x, dim, fixed);
    if (*scale != *scale) {
        std::memset(out, 0, (size_t)dim);
        return;
    }
    const float by = *scale;
    for (int64_t i = 0; i < dim; ++i) encode_one(x[i] / by, out[i]);
}

// Vectors of the cache's elements as floats, codes before they are scaled: the first `left` lanes, at most VW, the rest 0.
inline vf load_cached(const float* p, int64_t left) { return left >= VW ? load(p) : load_part(p, (int)left); }

inline vf load_cached(const uint16_t* p, int64_t left) {
    const int count = left >= VW ? VW : (int)left;
#if defined(__AVX512F__)
    if (count == VW)
        return (vf)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
#endif
    alignas(64) float lanes[VW] = {};
    for (int i = 0; i < count; ++i) lanes[i] = bf16_to_float(p[i]);
    return load(lanes);
}

inline float decode_one(int8_t code) { return (float)code; }

inline float decode_one(E4m3 code) {
    const uint32_t size = code.bits & 0x7Fu, sign = (uint32_t)(code.bits & 0x80u) << 24;
    const float small = (float)size * 0.001953125f, large = float_of((size << 20) + 0x3C000000u);
    return float_of(bits_of(size < 8 ? small : large) | sign);
}

#if defined(__AVX512F__) && defined(__AVX2__)

// 16 e4m3 codes as the halves that are them divided by 256.
static inline __m256i e4m3_halves(__m128i codes) {
    const __m256i wide = _mm256_cvtepu8_epi16(codes);
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
    return _mm256_or_si256(sign, _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7F)), 7));
}

static inline __m512 decode16(__m128i codes, int8_t) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)); }
static inline __m512 decode16(__m128i codes, E4m3) { return _mm512_mul_ps(_mm512_cvtph_ps(e4m3_halves(codes)), _mm512_set1_ps(256.0f)); }

#endif

template <class T>
inline vf load_cached(const T* p, int64_t left) {
    const int count = left >= VW ? VW : (int)left;
#if defined(__AVX512F__) && defined(__AVX2__)
    if (count == VW) return (vf)decode16(_mm_loadu_si128((const __m128i*)p), T());
#endif
    alignas(64) float lanes[VW] = {};
    for (int i = 0; i < count; ++i) lanes[i] = decode_one(p[i]);
    return load(lanes);
}

}  // namespace tandem
