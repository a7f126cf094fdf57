// Embedding rows by id; see kernels/embedding.py.

#include "common.h"

using namespace tandem;

extern "C" {

// out[count][width] = table[ids]. Returns -1, or the index of the first id outside [0, vocabulary) with nothing written.
int64_t tandem_embedding(const int64_t* ids, const void* table, float* out, int64_t count, int64_t vocabulary, int64_t width,
                         int32_t is_bf16) {
    for (int64_t t = 0; t < count; ++t)
        if (ids[t] < 0 || ids[t] >= vocabulary) return t;
    for (int64_t t = 0; t < count; ++t) {
        float* target = out + t * width;
        if (is_bf16) {
            const uint16_t* row = (const uint16_t*)table + ids[t] * width;
            for (int64_t i = 0; i < width; ++i) target[i] = bf16_to_float(row[i]);
        } else {
            std::memcpy(target, (const float*)table + ids[t] * width, (size_t)width * 4);
        }
    }
    return -1;
}
}
