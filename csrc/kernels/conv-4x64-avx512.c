/* conv for AVX-512: four pixels by 64 output channels. A product is rounded before it is added, as docs/format.md wants. */
#include "avx512.h"

#ifdef ABSTE_X86

typedef struct {
    const abste_job *job;
    uint32_t y, x, o;
    abste_range is, js;
    __mmask16 some[4]; /* channels of each register that exist */
} place;

/* Sixteen weights, from number `at` on. */
TARGET static inline __m512 weights(const abste_job *job, size_t at, __mmask16 some) {
    if (job->half)
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, (const uint16_t *)job->weight + at));
    return _mm512_maskz_loadu_ps(some, (const float *)job->weight + at);
}

#define KERNEL(P)                                                                                                               \
    TARGET static void sum_##P(const place *at, abste_sums *sums) {                                                             \
        const abste_job *job = at->job;                                                                                         \
        const abste_node_record *node = job->node;                                                                              \
        const int64_t row = (int64_t)at->y * node->stride[0] - node->padding[0];                                                \
        const int64_t column = (int64_t)at->x * node->stride[1] - node->padding[1];                                             \
        const size_t step = (size_t)node->stride[1] * job->C;                                                                   \
        __m512 total[P][4];                                                                                                     \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < 4; ++o) total[p][o] = _mm512_setzero_ps();                \
        for (uint32_t i = at->is.first; i < at->is.last; ++i)                                                                   \
            for (uint32_t j = at->js.first; j < at->js.last; ++j) {                                                             \
                const size_t r = (size_t)(row + (int64_t)i * node->dilation[0]);                                                \
                const size_t s = (size_t)(column + (int64_t)j * node->dilation[1]);                                             \
                const float *in = job->in + (r * job->W + s) * job->C;                                                          \
                size_t weight = ((size_t)i * node->kernel[1] + j) * job->C * job->c + at->o;                                    \
                for (uint32_t k = 0; k < job->C; ++k, weight += job->c) {                                                       \
                    __m512 w[4];                                                                                                \
                    UNROLL for (int o = 0; o < 4; ++o) w[o] = weights(job, weight + 16 * (size_t)o, at->some[o]);               \
                    UNROLL for (int p = 0; p < P; ++p) {                                                                        \
                        const __m512 number = _mm512_set1_ps(in[p * step + k]);                                                 \
                        UNROLL for (int o = 0; o < 4; ++o)                                                                      \
                            total[p][o] = _mm512_add_ps(total[p][o], _mm512_mul_ps(number, w[o]));                              \
                    }                                                                                                           \
                }                                                                                                               \
            }                                                                                                                   \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < 4; ++o) _mm512_store_ps(sums[p].f + 16 * o, total[p][o]); \
    }

KERNEL(1)
KERNEL(2)
KERNEL(4)

void abste_conv_avx512(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) {
    const abste_node_record *node = job->node;
    const uint32_t kw = node->kernel[1];
    place at = {.job = job, .y = y, .o = o};
    at.is = taps_inside((int64_t)y * node->stride[0] - node->padding[0], node->kernel[0], node->dilation[0], job->H);
    for (uint32_t v = 0; v < 4; ++v)
        at.some[v] = n >= 16 * (v + 1) ? (__mmask16)0xFFFF : n > 16 * v ? (__mmask16)((1u << (n - 16 * v)) - 1) : (__mmask16)0;
    _Alignas(64) abste_sums sums[4];
    for (uint32_t x = 0; x < job->w;) {
        const int64_t column = (int64_t)x * node->stride[1] - node->padding[1];
        at.js = taps_inside(column, kw, node->dilation[1], job->W);
        for (const uint32_t end = x + pixels_alike(job, column, at.js, job->w - x); x < end;) {
            const uint32_t pixels = end - x >= 4 ? 4 : end - x >= 2 ? 2 : 1;
            at.x = x;
            (pixels == 4 ? sum_4 : pixels == 2 ? sum_2 : sum_1)(&at, sums);
            job->finish(job, y, x, pixels, o, n, sums);
            x += pixels;
        }
    }
}
#endif
