// The two orders of a block's keys and values in the cache; see kernels/kv_order.py.
#pragma once

#include "common.h"

namespace tandem {

// One head's share of a block in plain order, [slot][dim]: where slot `offset` begins.
template <class T>
struct PlainSlot {
    T *keys, *values;
    void write_key(const float* source, int64_t dim) const { copy(keys, source, dim); }
    void write_value(const float* source, int64_t dim) const { copy(values, source, dim); }

private:
    static void copy(float* target, const float* source, int64_t dim) { std::memcpy(target, source, (size_t)dim * 4); }
    static void copy(uint16_t* target, const float* source, int64_t dim) {
        for (int64_t i = 0; i < dim; ++i) target[i] = float_to_bf16(source[i]);
    }
};

// In paired order, bf16: keys [dim / 2][slot][2 dims], values [slot / 2][dim][2 slots].
struct PairedSlot {
    uint32_t* keys;    // of this slot's first pair
    uint16_t* values;  // of this slot's first value
    int64_t block_size;
    void write_key(const float* source, int64_t dim) const {
        alignas(64) uint16_t rounded[256];
        for (int64_t i = 0; i < dim; ++i) rounded[i] = float_to_bf16(source[i]);
        for (int64_t i = 0; i < dim / 2; ++i) std::memcpy(keys + i * block_size, rounded + 2 * i, 4);
    }
    void write_value(const float* source, int64_t dim) const {
        for (int64_t i = 0; i < dim; ++i) values[2 * i] = float_to_bf16(source[i]);
    }
};

#if defined(__AVX512BW__)

// Words 0, 32, 1, 33, ... of a and b: a's and b's side by side; and 16, 48, 17, 49, ...
static inline __m512i pair_words() {
    alignas(64) static const uint16_t first[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                   8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    return _mm512_load_si512(first);
}
static inline __m512i pairs_low(__m512i a, __m512i b) { return _mm512_permutex2var_epi16(a, pair_words(), b); }
static inline __m512i pairs_high(__m512i a, __m512i b) {
    return _mm512_permutex2var_epi16(a, _mm512_add_epi16(pair_words(), _mm512_set1_epi16(16)), b);
}

#endif

}  // namespace tandem
