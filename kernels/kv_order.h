// The two orders of a block's keys and values in the cache; see kernels/kv_order.py.
#pragma once

#include "kv_codes.h"

namespace tandem {

// A cache's blocks of one layer, as steps write them: codes in their format, and scales where the format has them.
struct KvBlocks {
    void* cache;    // keys of block 0
    float* scales;  // theirs, or null
    int64_t block_stride, scales_stride, block_size;  // strides between blocks, in elements and in floats
    int64_t format;
    bool paired;
    float key_scale, value_scale;  // fixed ones; 0: each row's own
};

// One head's share of a block in plain order, [slot][dim]: where slot `offset` begins.
template <class T>
struct PlainSlot {
    T *keys, *values;
    void write_key(const T* row, int64_t dim) const { std::memcpy(keys, row, (size_t)dim * sizeof(T)); }
    void write_value(const T* row, int64_t dim) const { std::memcpy(values, row, (size_t)dim * sizeof(T)); }
};

// In paired order, 2 bytes or 1 an element: keys [dim / 2][slot][2 dims], values [slot / 2][dim][2 slots].
template <class T>
struct PairedSlot {
    T *keys, *values;  // of this slot's first pair, and its first value
    int64_t block_size;
    void write_key(const T* row, int64_t dim) const {
        for (int64_t i = 0; i < dim / 2; ++i) std::memcpy(keys + i * 2 * block_size, row + 2 * i, 2 * sizeof(T));
    }
    void write_value(const T* row, int64_t dim) const {
        for (int64_t i = 0; i < dim; ++i) values[2 * i] = row[i];
    }
};

// Write one head's key and value at a slot of the cache.
template <class T>
inline void write_head(const KvBlocks& to, int64_t slot, int64_t kv_heads, int64_t head, const float* key, const float* value, int64_t dim) {
    const int64_t block = slot / to.block_size, offset = slot % to.block_size, head_size = to.block_size * dim;
    T *keys = (T*)to.cache + block * to.block_stride + head * head_size, *values = keys + kv_heads * head_size;
    float *key_scale = nullptr, *value_scale = nullptr;
    if (HAS_SCALES<T>) {
        key_scale = to.scales + block * to.scales_stride + head * to.block_size + offset;
        value_scale = key_scale + kv_heads * to.block_size;
    }
    alignas(64) T row[256];
    const auto write = [&](const auto& place) {
        encode_row(key, dim, to.key_scale, row, key_scale);
        place.write_key(row, dim);
        encode_row(value, dim, to.value_scale, row, value_scale);
        place.write_value(row, dim);
    };
    if (to.paired)
        write(PairedSlot<T>{keys + 2 * offset, values + offset / 2 * 2 * dim + offset % 2, to.block_size});
    else
        write(PlainSlot<T>{keys + offset * dim, values + offset * dim});
}

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
