/* xnor for AVX-512 with VPOPCNTDQ: seven pixels by two registers of sixteen channels, or one pixel by four. */
#include "avx512.h"

#ifdef ABSTE_X86
#include "steps.h"
#include "xnor.h"

/* The words of a pixel; the second one is there if it has channels. */
INLINE void store_bits(const destination *to, int p, uint64_t set, const int O) {
    uint32_t *bits = to->bits + (size_t)p * to->words;
    bits[0] = (uint32_t)set;
    if (O > 2 && to->channels > 32)
        bits[1] = (uint32_t)(set >> 32);
}

#define KERNEL(P, O)                                                                                                            \
    TARGET static void count_##P##_##O(const run_of_taps *runs, uint32_t count, size_t step, int32_t taps,                      \
                                       const destination *to) {                                                                 \
        __m512i total[P][O];                                                                                                    \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < O; ++o) total[p][o] = _mm512_setzero_si512();             \
        for (uint32_t r = 0; r < count; ++r) {                                                                                  \
            const uint32_t *in = runs[r].in, *weight = runs[r].weight + to->first;                                              \
            for (uint32_t t = 0; t < runs[r].words; ++t, weight += BLOCK) {                                                     \
                __m512i w[O];                                                                                                   \
                UNROLL for (int o = 0; o < O; ++o) w[o] = _mm512_load_si512(weight + 16 * o);                                   \
                UNROLL for (int p = 0; p < P; ++p) {                                                                            \
                    const __m512i bits = _mm512_set1_epi32((int32_t)in[p * step + t]);                                          \
                    UNROLL for (int o = 0; o < O; ++o)                                                                          \
                        total[p][o] = _mm512_add_epi32(total[p][o], _mm512_popcnt_epi32(_mm512_xor_si512(w[o], bits)));         \
                }                                                                                                               \
            }                                                                                                                   \
        }                                                                                                                       \
        const __m512i all = _mm512_set1_epi32(taps);                                                                            \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < O; ++o)                                                   \
            total[p][o] = _mm512_sub_epi32(all, _mm512_slli_epi32(total[p][o], 1));                                             \
        const uint64_t exist = ~0ull >> (64 - to->channels);                                                                    \
        if (to->thresholds) {                                                                                                   \
            __m512i t[O], d[O];                                                                                                 \
            UNROLL for (int o = 0; o < O; ++o)                                                                                  \
                thresholds(to->thresholds + 32 * o, (__mmask16)(exist >> 16 * o), &t[o], &d[o]);                                \
            UNROLL for (int p = 0; p < P; ++p) { /* d * sum >= t */                                                             \
                uint64_t set = 0;                                                                                               \
                UNROLL for (int o = 0; o < O; ++o) {                                                                            \
                    const __m512i turned = _mm512_mask_sub_epi32(total[p][o], _mm512_movepi32_mask(d[o]), _mm512_setzero_si512(),\
                                                                 total[p][o]);                                                  \
                    set |= (uint64_t)_mm512_cmpge_epi32_mask(turned, t[o]) << 16 * o;                                           \
                }                                                                                                               \
                store_bits(to, p, set & exist, O);                                                                              \
            }                                                                                                                   \
        } else if (to->job) {                                                                                                   \
            uint64_t set[P] = {0};                                                                                              \
            UNROLL for (int o = 0; o < O; ++o) {                                                                                \
                if (exist >> 16 * o == 0)                                                                                       \
                    break;                                                                                                      \
                const uint32_t some = to->channels - 16 * o < 16 ? to->channels - 16 * o : 16;                                  \
                lanes v[P];                                                                                                     \
                UNROLL for (int p = 0; p < P; ++p) v[p] = _mm512_cvtepi32_ps(total[p][o]);                                      \
                step_lanes(to->job, to->y, to->x, to->o + 16 * o, some, P, v);                                                  \
                store_pixels(to->job, to->y, to->x, to->o + 16 * o, some, P, v);                                                \
                UNROLL for (int p = 0; p < P; ++p)                                                                              \
                    set[p] |= (uint64_t)_mm512_cmp_ps_mask(v[p], _mm512_setzero_ps(), _CMP_GE_OQ) << 16 * o;                    \
            }                                                                                                                   \
            if (to->bits)                                                                                                       \
                UNROLL for (int p = 0; p < P; ++p) store_bits(to, p, set[p] & exist, O);                                        \
        } else {                                                                                                                \
            UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < O; ++o)                                               \
                _mm512_store_si512(to->sums[p].i + to->first + 16 * o, total[p][o]);                                            \
        }                                                                                                                       \
    }

KERNEL(1, 2)
KERNEL(2, 2)
KERNEL(3, 2)
KERNEL(4, 2)
KERNEL(5, 2)
KERNEL(6, 2)
KERNEL(7, 2)
KERNEL(1, 4)

static const counter COUNTERS[8] = {NULL, count_1_2, count_2_2, count_3_2, count_4_2, count_5_2, count_6_2, count_7_2};
static const counter SINGLE[2] = {NULL, count_1_4};

/* A linear layer reads each weight once: from front to back is fastest. */
static void row_of(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) {
    if (job->w == 1)
        xnor_row(job, y, o, n, SINGLE, 1, 64, 1);
    else
        xnor_row(job, y, o, n, COUNTERS, 7, 32, 1);
}

const abste_packed_kernel abste_xnor_avx512 = {xnor_bytes, xnor_pack, row_of, 0};
#endif
