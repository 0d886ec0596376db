/* sign_conv for AVX2: eight pixels by a register of channels.
 *
 * A register holds eight sums, those that add the fourth input; the others are these with the opposite sign, to the bit but for
 * NaN, and for zeros, which count alike for a sum that starts at +0. Three bits of the weight choose one (vpermps), the fourth
 * its sign.
 */
#include "avx2.h"

#ifdef ABSTE_X86
#define TABLE 8
#include "lanes.h"
#include "sign_conv.h"

INLINE __m256 turned(float number, __m256 signs) { return _mm256_xor_ps(_mm256_set1_ps(number), signs); }

INLINE void table_of(const float *four, float *out) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), first = _mm256_set1_epi32(INT32_MIN);
    __m256 signs[3]; /* set where the bit is clear */
    UNROLL for (int b = 0; b < 3; ++b)
        signs[b] = _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_slli_epi32(lane, 31 - b), first));
    const __m256 low = _mm256_add_ps(turned(four[0], signs[0]), turned(four[1], signs[1]));
    const __m256 high = _mm256_add_ps(turned(four[2], signs[2]), _mm256_set1_ps(four[3]));
    _mm256_store_ps(out, _mm256_add_ps(low, high));
}

TARGET static void tabulate(const float *in, size_t step, uint32_t pixels, uint32_t count, tables *out) {
    for (; pixels; --pixels, in += step, ++out) {
        uint32_t g = 0;
        for (; g < count / 4; ++g)
            table_of(in + 4 * g, out->sums[g]);
        if (count % 4) {
            float last[4] = {0};
            for (uint32_t b = 0; b < count % 4; ++b)
                last[b] = in[4 * g + b];
            table_of(last, out->sums[g]);
        }
    }
}

/* P pixels by O registers, until n channels are done. */
INLINE void add_some(const tables *in, size_t step, size_t dilation, const uint32_t *weights, uint32_t taps, uint32_t groups,
                     uint32_t n, abste_sums *sums, const int P, const int O) {
    const __m256i first = _mm256_set1_epi32(INT32_MIN);
    for (uint32_t m = 0; m < n; m += 8 * (uint32_t)O) {
        __m256 total[8][4];
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < O; ++o) total[p][o] = _mm256_load_ps(sums[p].f + m + 8 * o);
        const tables *under = in;
        const uint32_t *weight = weights + m;
        for (uint32_t j = 0; j < taps; ++j, under += dilation, weight += BLOCK) {
            __m256i which[4];
            UNROLL for (int o = 0; o < O; ++o) which[o] = _mm256_load_si256((const __m256i *)(const void *)(weight + 8 * o));
            for (uint32_t g = 0; g < groups; ++g)
                UNROLL for (int o = 0; o < O; ++o) {
                    const __m256 sign = _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_slli_epi32(which[o], 28), first));
                    UNROLL for (int p = 0; p < P; ++p) {
                        const __m256 sum = _mm256_permutevar8x32_ps(_mm256_load_ps(under[p * step].sums[g]), which[o]);
                        total[p][o] = _mm256_add_ps(total[p][o], _mm256_xor_ps(sum, sign));
                    }
                    which[o] = _mm256_srli_epi32(which[o], 4);
                }
        }
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < O; ++o) _mm256_store_ps(sums[p].f + m + 8 * o, total[p][o]);
    }
}

#define KERNEL(P, O)                                                                                                           \
    TARGET static void add_##P(const tables *in, size_t step, size_t dilation, const uint32_t *weights, uint32_t taps,         \
                               uint32_t groups, uint32_t n, abste_sums *sums) {                                                \
        add_some(in, step, dilation, weights, taps, groups, n, sums, P, O);                                                    \
    }
KERNEL(1, 4)
KERNEL(2, 4)
KERNEL(3, 2)
KERNEL(4, 2)
KERNEL(5, 1)
KERNEL(6, 1)
KERNEL(7, 1)
KERNEL(8, 1)

static const adder ADDERS[9] = {NULL, add_1, add_2, add_3, add_4, add_5, add_6, add_7, add_8};

static void add(const addition *what) { add_by(ADDERS, 8, what); }

static void row_of(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) { sign_conv_row(job, y, o, n, tabulate, add); }

const abste_packed_kernel abste_sign_conv_avx2 = {sign_conv_bytes, sign_conv_pack, row_of, 1};
#endif
