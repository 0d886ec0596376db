/* conv for AVX-512: twelve pixels by 32 output channels. A product is rounded before it is added, as docs/format.md wants. */
#include "avx512.h"

#ifdef ABSTE_X86

#define MOST_PIXELS 12u
#define OUTPUTS 32u /* channels at a time: more of their weights would not stay in the nearest cache */

typedef struct {
    const abste_job *job;
    const float *in; /* under the first tap inside, of pixel 0 */
    size_t step, row; /* floats from pixel to pixel, and from row to row of the kernel */
    const float *weight;
    uint32_t rows, runs, length; /* of the kernel inside: rows, their runs of neighbouring inputs, inputs of a run */
} place;

size_t abste_conv_bytes_avx512(const abste_model *model, const abste_node_record *node) {
    const size_t terms = (size_t)node->kernel[0] * node->kernel[1] * value_at(model, node->in0)->c;
    return (written_by(model, node)->c + OUTPUTS - 1) / OUTPUTS * terms * OUTPUTS * sizeof(float);
}

/* For 32 output channels together, in the order of the sum. */
void abste_conv_pack_avx512(const abste_model *model, const abste_node_record *node, void *memory) {
    const abste_job job = abste_job_of(model, node);
    const size_t terms = (size_t)node->kernel[0] * node->kernel[1] * job.C;
    float *out = memory;
    for (uint32_t o = 0; o < job.c; o += OUTPUTS)
        for (size_t k = 0; k < terms; ++k)
            for (uint32_t m = 0; m < OUTPUTS; ++m)
                *out++ = o + m < job.c ? abste_weight(&job, k * job.c + o + m) : 0;
}

#define KERNEL(P, O)                                                                                                             \
    TARGET static void sum_##P##_##O(const place *at, abste_sums *sums) {                                                     \
        const abste_job *job = at->job;                                                                                         \
        const size_t step = at->step;                                                                                           \
        __m512 total[P][O];                                                                                                     \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < O; ++o) total[p][o] = _mm512_setzero_ps();                \
        for (uint32_t i = 0; i < at->rows; ++i)                                                                                 \
            for (uint32_t run = 0; run < at->runs; ++run) {                                                                     \
                const float *in = at->in + i * at->row + (size_t)run * job->node->dilation[1] * job->C;                         \
                const float *weight = at->weight + ((size_t)i * job->node->kernel[1] + run) * job->C * OUTPUTS;                 \
                const float *near[(P + 2) / 3]; /* a pointer for three pixels: twelve would not fit into registers */           \
                UNROLL for (int p = 0; p < P; p += 3) {                                                                         \
                    near[p / 3] = in + p * step;                                                                                \
                    __asm__("" : "+r"(near[p / 3])); /* else they are computed anew from the first */                           \
                }                                                                                                               \
                for (uint32_t k = 0; k < at->length; ++k, weight += OUTPUTS) {                                                   \
                    __m512 w[O];                                                                                                \
                    UNROLL for (int o = 0; o < O; ++o) w[o] = _mm512_load_ps(weight + 16 * o);       \
                    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < O; ++o)                                       \
                        total[p][o] = _mm512_add_ps(total[p][o], times_shared(w[o], &near[p / 3][p % 3 * step]));               \
                    UNROLL for (int p = 0; p < P; p += 3) ++near[p / 3];                                                        \
                }                                                                                                               \
            }                                                                                                                   \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < O; ++o) _mm512_store_ps(sums[p].f + 16 * o, total[p][o]); \
    }
#define KERNELS(P) KERNEL(P, 1) KERNEL(P, 2)
KERNELS(1)
KERNELS(2)
KERNELS(4)
KERNELS(7)
KERNELS(12)

static const struct {
    uint32_t pixels;
    void (*sum[2])(const place *, abste_sums *); /* of one register and of two */
} SUMMERS[] = {{12, {sum_12_1, sum_12_2}}, {7, {sum_7_1, sum_7_2}}, {4, {sum_4_1, sum_4_2}}, {2, {sum_2_1, sum_2_2}}, {1, {sum_1_1, sum_1_2}}};

void abste_conv_avx512(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) {
    const abste_node_record *node = job->node;
    const uint32_t kw = node->kernel[1];
    const int64_t row = (int64_t)y * node->stride[0] - node->padding[0];
    const abste_range is = taps_inside(row, node->kernel[0], node->dilation[0], job->H);
    const size_t terms = (size_t)node->kernel[0] * kw * job->C;
    place at = {.job = job,
                .step = (size_t)node->stride[1] * job->C,
                .row = (size_t)node->dilation[0] * job->W * job->C,
                .rows = is.last - is.first};
    _Alignas(64) abste_sums sums[MOST_PIXELS];
    for (uint32_t x = 0; x < job->w;) {
        const int64_t column = (int64_t)x * node->stride[1] - node->padding[1];
        const abste_range js = taps_inside(column, kw, node->dilation[1], job->W);
        const uint32_t taps = js.last - js.first;
        if (at.rows && taps)
            at.in = job->in + ((size_t)(row + (int64_t)is.first * node->dilation[0]) * job->W +
                               (size_t)(column + (int64_t)js.first * node->dilation[1])) * job->C;
        at.runs = node->dilation[1] == 1 && taps ? 1 : taps;
        at.length = node->dilation[1] == 1 ? taps * job->C : job->C;
        for (uint32_t alike = pixels_alike(job, column, js, job->w - x), kind = 0; alike;) {
            while (SUMMERS[kind].pixels > alike)
                ++kind;
            const uint32_t pixels = SUMMERS[kind].pixels;
            for (uint32_t first = 0; first < n; first += OUTPUTS) {
                at.weight = (const float *)job->packed + (o + first) * terms + ((size_t)is.first * kw + js.first) * job->C * OUTPUTS;
                SUMMERS[kind].sum[n - first > 16](&at, (abste_sums *)(void *)(sums->f + first));
            }
            job->finish(job, y, x, pixels, o, n, sums);
            at.in += pixels * at.step;
            x += pixels, alike -= pixels;
        }
    }
}
#endif
