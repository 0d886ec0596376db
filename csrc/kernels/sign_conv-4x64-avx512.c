/* sign_conv for AVX-512: four pixels by 64 channels, or 32, or 16. A table of sixteen sums is one register (vpermps). */
#include "avx512.h"

#ifdef ABSTE_X86
#define TABLE 16
#include "lanes.h"
#include "sign_conv.h"

/* The sign of a number turned in some lanes. */
TARGET static inline __m512 turned(const float *number, __m512i signs) { return xor_shared(_mm512_castsi512_ps(signs), number); }

TARGET static void tabulate(const float *in, size_t step, uint32_t pixels, uint32_t count, tables *out) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), one = _mm512_set1_epi32(1);
    __m512i signs[4]; /* set where the bit is clear */
    UNROLL for (int b = 0; b < 4; ++b)
        signs[b] = _mm512_slli_epi32(_mm512_andnot_si512(_mm512_srl_epi32(lane, _mm_cvtsi32_si128(b)), one), 31);
    for (; pixels; --pixels, in += step, ++out)
        for (uint32_t k = 0; k < count; k += 4) {
            const float *four = in + k;
            float last[4] = {0};
            if (count - k < 4) {
                for (uint32_t b = 0; b < count - k; ++b)
                    last[b] = four[b];
                four = last;
            }
            const __m512 low = _mm512_add_ps(turned(&four[0], signs[0]), turned(&four[1], signs[1]));
            const __m512 high = _mm512_add_ps(turned(&four[2], signs[2]), turned(&four[3], signs[3]));
            _mm512_store_ps(out->sums[k / 4], _mm512_add_ps(low, high));
        }
}

/* P pixels by O registers. */
INLINE void add_some(const tables *in, size_t step, size_t dilation, const uint32_t *weight, uint32_t taps, uint32_t groups,
                     abste_sums *sums, const int P, const int O) {
    __m512 total[4][4];
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < O; ++o) total[p][o] = _mm512_load_ps(sums[p].f + 16 * o);
    for (uint32_t j = 0; j < taps; ++j, in += dilation, weight += BLOCK) {
        __m512i which[4];
        UNROLL for (int o = 0; o < O; ++o) which[o] = _mm512_load_si512(weight + 16 * o);
        for (uint32_t g = 0; g < groups; ++g) {
            UNROLL for (int p = 0; p < P; ++p) {
                const __m512 table = _mm512_load_ps(in[p * step].sums[g]);
                UNROLL for (int o = 0; o < O; ++o)
                    total[p][o] = _mm512_add_ps(total[p][o], _mm512_permutexvar_ps(which[o], table));
            }
            UNROLL for (int o = 0; o < O; ++o) which[o] = _mm512_srli_epi32(which[o], 4);
        }
    }
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < O; ++o) _mm512_store_ps(sums[p].f + 16 * o, total[p][o]);
}

#define KERNEL(P)                                                                                                              \
    TARGET static void add_##P(const tables *in, size_t step, size_t dilation, const uint32_t *weight, uint32_t taps,          \
                               uint32_t groups, uint32_t n, abste_sums *sums) {                                                \
        if (n > 32)                                                                                                            \
            add_some(in, step, dilation, weight, taps, groups, sums, P, 4);                                                    \
        else if (n > 16)                                                                                                       \
            add_some(in, step, dilation, weight, taps, groups, sums, P, 2);                                                    \
        else                                                                                                                   \
            add_some(in, step, dilation, weight, taps, groups, sums, P, 1);                                                    \
    }
KERNEL(1)
KERNEL(2)
KERNEL(3)
KERNEL(4)

static const adder ADDERS[5] = {NULL, add_1, add_2, add_3, add_4};

static void add(const addition *what) { add_by(ADDERS, 4, what); }

static void row_of(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) { sign_conv_row(job, y, o, n, tabulate, add); }

const abste_packed_kernel abste_sign_conv_avx512 = {sign_conv_bytes, sign_conv_pack, row_of, 1};
#endif
