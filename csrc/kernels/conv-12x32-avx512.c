/* conv for AVX-512: twelve pixels by 32 output channels. */
#include "avx512.h"

#ifdef ABSTE_X86
#define OUTPUTS 32u /* more of their weights would not stay in the nearest cache */
#include "conv.h"

#define KERNEL(P, O)                                                                                                            \
    TARGET static void some_##P##_##O(const conv_place *at, float *to) {                                                        \
        const size_t step = at->step;                                                                                           \
        __m512 total[P][O];                                                                                                     \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < O; ++o) total[p][o] = _mm512_setzero_ps();                \
        for (uint32_t i = 0; i < at->rows; ++i)                                                                                 \
            for (uint32_t run = 0; run < at->runs; ++run) {                                                                     \
                const float *in = at->in + i * at->row + run * at->run;                                                         \
                const float *weight = at->weight + i * at->weight_row + run * at->weight_run;                                   \
                const float *near[(P + 2) / 3]; /* a pointer for three pixels: twelve would not fit into registers */           \
                UNROLL for (int p = 0; p < P; p += 3) {                                                                         \
                    near[p / 3] = in + p * step;                                                                                \
                    __asm__("" : "+r"(near[p / 3])); /* else they are computed anew from the first */                           \
                }                                                                                                               \
                for (uint32_t k = 0; k < at->length; ++k, weight += OUTPUTS) {                                                  \
                    __m512 w[O];                                                                                                \
                    UNROLL for (int o = 0; o < O; ++o) w[o] = _mm512_load_ps(weight + 16 * o);                                  \
                    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < O; ++o)                                       \
                        total[p][o] = _mm512_add_ps(total[p][o], times_shared(w[o], &near[p / 3][p % 3 * step]));               \
                    UNROLL for (int p = 0; p < P; p += 3) ++near[p / 3];                                                        \
                }                                                                                                               \
            }                                                                                                                   \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < O; ++o) _mm512_store_ps(to + p * BLOCK + 16 * o, total[p][o]); \
    }
#define KERNELS(P)                                                                                                              \
    KERNEL(P, 1)                                                                                                                \
    KERNEL(P, 2)                                                                                                                \
    static void sum_##P(const conv_place *at, uint32_t n, abste_sums *sums) {                                                   \
        conv_place here = *at;                                                                                                  \
        for (uint32_t m = 0; m < n; m += OUTPUTS, here.weight += at->weight_next)                                               \
            (n - m > 16 ? some_##P##_2 : some_##P##_1)(&here, sums->f + m);                                                     \
    }

KERNELS(1)
KERNELS(2)
KERNELS(4)
KERNELS(7)
KERNELS(12)

static const conv_summer SUMMERS[] = {{12, sum_12}, {7, sum_7}, {4, sum_4}, {2, sum_2}, {1, sum_1}};

static void row_of(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) { conv_row(job, y, o, n, SUMMERS); }

const abste_packed_kernel abste_conv_avx512 = {conv_bytes, conv_pack, row_of, 0};
#endif
