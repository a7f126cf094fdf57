// The softmax of attention_bf16.h: rows of 64 scores to weights in pairs of bf16, 16 rows at once.
#pragma once

#include "bf16_tile.h"

namespace tandem {

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

constexpr int FEW_ROWS = 6;  // that many or fewer are reduced one by one

// 2^(x * unit) for x <= 0 and unit > 0, relative error about 1e-4: the results are rounded to bf16. 1 for 0; less than any normal number, which
// bf16 has as 0, from a product of -126 on. NaNs stay.
static inline __m512 exp2_roughly(__m512 x, __m512 unit, __m512 least) {
    const __m512 magic = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to an integer in its last bits
    x = _mm512_max_ps(least, x);
    const __m512 t = _mm512_fmadd_ps(x, unit, magic), f = _mm512_fmsub_ps(x, unit, _mm512_sub_ps(t, magic));
    __m512 p = _mm512_set1_ps(5.500892e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4221097e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9328293e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}

struct Larger {
    __m512 operator()(__m512 a, __m512 b) const { return _mm512_max_ps(a, b); }
};
struct Sum {
    __m512 operator()(__m512 a, __m512 b) const { return _mm512_add_ps(a, b); }
};

// Lane i of the result: the lanes of x[i] taken together, by halves, the same tree for each.
template <class Together>
inline __m512 reduce_rows(const __m512* x, const Together& together) {
    static constexpr int PLACE[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};  // where the shuffles bring each
    __m512 a[8];
    for (int i = 0; i < 8; ++i) {
        const __m512 low = x[PLACE[i]], high = x[PLACE[i + 8]];
        a[i] = together(_mm512_shuffle_f32x4(low, high, 0x44), _mm512_shuffle_f32x4(low, high, 0xEE));
    }
    for (int i = 0; i < 4; ++i) a[i] = together(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD));
    for (int i = 0; i < 2; ++i) a[i] = together(_mm512_shuffle_ps(a[i], a[i + 2], 0x44), _mm512_shuffle_ps(a[i], a[i + 2], 0xEE));
    return together(_mm512_shuffle_ps(a[0], a[1], 0x88), _mm512_shuffle_ps(a[0], a[1], 0xDD));
}

// The lanes of x taken together as `reduce_rows` does it.
template <class Together>
inline float reduce_row(__m512 x, const Together& together) {
    x = together(x, _mm512_shuffle_f32x4(x, x, 0x4E));
    x = together(x, _mm512_shuffle_f32x4(x, x, 0xB1));
    x = together(x, _mm512_shuffle_ps(x, x, 0x4E));
    return _mm512_cvtss_f32(together(x, _mm512_shuffle_ps(x, x, 0xB1)));
}

// The scores of a row, which lie at `slot`, as they count, from here on in their place: times their keys' scales, and nothing where the row must not see.
inline void finish_scores(const AttentionCall& call, Bf16Scratch& s, int64_t row, int64_t slot) {
    if (call.scales == nullptr && s.begin[row] == 0 && s.end[row] == POSITIONS) return;
    const uint64_t all = ~(uint64_t)0, seen = (all << s.begin[row]) & (all >> (POSITIONS - s.end[row]));
    float* scores = s.scores + slot * POSITIONS;
    for (int v = 0; v < 4; ++v) {
        const __m512 raw = _mm512_load_ps(scores + 16 * v), scaled = call.scales ? _mm512_mul_ps(raw, _mm512_load_ps(s.key_scales + 16 * v)) : raw;
        _mm512_store_ps(scores + 16 * v, _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (__mmask16)(seen >> 16 * v), scaled));
    }
}

// Weights of a row from its scores, given the highest so far; stored as pairs of bf16. Returns their sum by lanes.
inline __m512 weigh(const AttentionCall& call, Bf16Scratch& s, int64_t slot, __m512 unit, __m512 least, float highest) {
    const float* scores = s.scores + slot * POSITIONS;
    const __m512 now = _mm512_set1_ps(highest);
    __m512 value[4];
    for (int v = 0; v < 4; ++v) value[v] = exp2_roughly(_mm512_sub_ps(_mm512_load_ps(scores + 16 * v), now), unit, least);
    const __m512 total = _mm512_add_ps(_mm512_add_ps(value[0], value[1]), _mm512_add_ps(value[2], value[3]));
    if (call.scales)
        for (int v = 0; v < 4; ++v) {
            const __mmask16 some = _mm512_cmp_ps_mask(value[v], _mm512_set1_ps(1.17549435e-38f), _CMP_NLT_UQ);  // what is not seen has any scale
            value[v] = _mm512_maskz_mul_ps(some, value[v], _mm512_load_ps(s.value_scales + 16 * v));
        }
    _mm512_store_si512(s.weights[slot], (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]));
    _mm512_store_si512(s.weights[slot] + 16, (__m512i)_mm512_cvtne2ps_pbh(value[3], value[2]));
    return total;
}

inline __m512 largest_scores(const Bf16Scratch& s, int64_t slot) {
    const float* scores = s.scores + slot * POSITIONS;
    const Larger larger;
    return larger(larger(_mm512_load_ps(scores), _mm512_load_ps(scores + 16)), larger(_mm512_load_ps(scores + 32), _mm512_load_ps(scores + 48)));
}

// `soften` of attention.h in powers of 2, for rows [row, row + count) of at most 16, whose scores and weights lie from `slot` on.
inline void soften_bf16(const AttentionCall& call, Bf16Scratch& s, int64_t row, int64_t count, int64_t dim, int64_t slot) {
    const float power = call.scale * 1.44269504088896341f;
    const __m512 unit = _mm512_set1_ps(power), least = _mm512_set1_ps(-126.3f / power);
    const __mmask16 rows = (__mmask16)((1u << count) - 1);
    alignas(64) __m512 each[16];
    for (int64_t r = 0; r < count; ++r) finish_scores(call, s, row + r, slot + r), each[r] = largest_scores(s, slot + r);
    __m512 best = _mm512_setzero_ps();
    if (count > FEW_ROWS) {
        for (int64_t r = count; r < 16; ++r) each[r] = _mm512_setzero_ps();
        best = reduce_rows(each, Larger());
    } else {
        for (int64_t r = 0; r < count; ++r) best = _mm512_mask_mov_ps(best, (__mmask16)(1u << r), _mm512_set1_ps(reduce_row(each[r], Larger())));
    }
    const __m512 before = _mm512_maskz_loadu_ps(rows, s.highest + row), now = _mm512_max_ps(best, before);
    // From nothing seen (-inf) to whatever is seen now, 0; and 1 where nothing changes.
    const __m512 shrink = exp2_roughly(_mm512_sub_ps(before, now), unit, least);
    const __mmask16 changed = _mm512_mask_cmp_ps_mask(rows, now, before, _CMP_NEQ_UQ);
    alignas(64) float highest[16], factor[16];
    _mm512_store_ps(highest, now);
    _mm512_store_ps(factor, shrink);
    for (int64_t r = 0; r < count; ++r) each[r] = weigh(call, s, slot + r, unit, least, highest[r]);
    __m512 total = _mm512_setzero_ps();
    if (count > FEW_ROWS)
        total = reduce_rows(each, Sum());
    else
        for (int64_t r = 0; r < count; ++r) total = _mm512_mask_mov_ps(total, (__mmask16)(1u << r), _mm512_set1_ps(reduce_row(each[r], Sum())));
    _mm512_mask_storeu_ps(s.highest + row, rows, now);
    _mm512_mask_storeu_ps(s.total + row, rows, _mm512_fmadd_ps(_mm512_maskz_loadu_ps(rows, s.total + row), shrink, total));
    for (uint32_t left = changed; left != 0; left &= left - 1) {
        const int64_t r = __builtin_ctz(left);
        float* out = s.out + (row + r) * dim;
        const __m512 by = _mm512_set1_ps(factor[r]);
        for (int64_t d = 0; d < dim; d += 16) _mm512_store_ps(out + d, _mm512_mul_ps(_mm512_load_ps(out + d), by));
    }
}

inline void soften_bf16_rows(const AttentionCall& call, Bf16Scratch& s, int64_t first, int64_t last, int64_t dim) {
    for (int64_t row = first; row < last; row += 16) soften_bf16(call, s, row, last - row < 16 ? last - row : 16, dim, row);
}

#endif

}  // namespace tandem
