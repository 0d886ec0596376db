/* conv: what kernels share. A product is rounded before it is added, as docs/format.md wants. The file that includes this has defined
 * OUTPUTS, the channels whose weights lie together: those that a kernel computes at once. */
#ifndef ABSTE_CONV_H
#define ABSTE_CONV_H

#include "lanes.h"

#define MOST_PIXELS 12u /* that any of the kernels takes at once */

/* Where a kernel reads. A row of the kernel is one run of neighbouring inputs, or has gaps between its taps. */
typedef struct {
    const float *in, *weight;                   /* under the first tap inside, of the first pixel */
    size_t step, row, run;                      /* floats from pixel to pixel, row to row and run to run */
    size_t weight_row, weight_run, weight_next; /* the same of weights, and from some OUTPUTS channels to the next */
    uint32_t rows, runs, length;                /* inside; inputs of a run */
} conv_place;

/* Sums n channels of so many pixels. */
typedef struct {
    uint32_t pixels;
    void (*sum)(const conv_place *at, uint32_t n, abste_sums *sums);
} conv_summer;

static inline size_t conv_bytes(const abste_model *model, const abste_node_record *node) {
    const size_t terms = (size_t)node->kernel[0] * node->kernel[1] * value_at(model, node->in0)->c;
    return node->groups != 1 ? 0 : (written_by(model, node)->c + OUTPUTS - 1) / OUTPUTS * terms * OUTPUTS * sizeof(float);
}

/* For some output channels together, in the order of the sum. */
static inline void conv_pack(const abste_model *model, const abste_node_record *node, void *memory) {
    const abste_job job = abste_job_of(model, node);
    const size_t terms = (size_t)node->kernel[0] * node->kernel[1] * job.C;
    float *out = memory;
    for (uint32_t o = 0; o < job.c; o += OUTPUTS)
        for (size_t k = 0; k < terms; ++k)
            for (uint32_t m = 0; m < OUTPUTS; ++m)
                *out++ = o + m < job.c ? abste_weight(&job, k * job.c + o + m) : 0;
}

/* Summers are tried in their order; the last one is for one pixel. */
static inline void conv_row(const abste_job *job, uint32_t y, uint32_t o, uint32_t n, const conv_summer *summers) {
    const abste_node_record *node = job->node;
    const uint32_t kw = node->kernel[1], near = node->dilation[1] == 1;
    const int64_t row = (int64_t)y * node->stride[0] - node->padding[0];
    const abste_range is = taps_inside(row, node->kernel[0], node->dilation[0], job->H);
    const size_t tap = (size_t)job->C * OUTPUTS;
    conv_place at = {.step = (size_t)node->stride[1] * job->C,
                     .row = (size_t)node->dilation[0] * job->W * job->C,
                     .run = (size_t)node->dilation[1] * job->C,
                     .weight_row = kw * tap,
                     .weight_run = tap,
                     .weight_next = node->kernel[0] * kw * tap,
                     .rows = is.last - is.first};
    const float *weight = (const float *)job->packed + o / OUTPUTS * at.weight_next + is.first * at.weight_row;
    _Alignas(64) abste_sums sums[MOST_PIXELS];
    for (uint32_t x = 0; x < job->w;) {
        const int64_t column = (int64_t)x * node->stride[1] - node->padding[1];
        const abste_range js = taps_inside(column, kw, node->dilation[1], job->W);
        const uint32_t taps = js.last - js.first;
        at.in = job->in;
        if (at.rows && taps)
            at.in += ((size_t)(row + (int64_t)is.first * node->dilation[0]) * job->W +
                      (size_t)(column + (int64_t)js.first * node->dilation[1])) * job->C;
        at.weight = weight + js.first * tap;
        at.runs = near && taps ? 1 : taps;
        at.length = near ? taps * job->C : job->C;
        const conv_summer *summer = summers;
        for (uint32_t alike = pixels_alike(job, column, js, job->w - x); alike;) {
            while (summer->pixels > alike)
                ++summer;
            const uint32_t pixels = summer->pixels;
            summer->sum(&at, n, sums);
            job->finish(job, y, x, pixels, o, n, sums);
            at.in += pixels * at.step;
            x += pixels, alike -= pixels;
        }
    }
}

/* P pixels by R times OUTPUTS channels, in registers of any width. */
INLINE void conv_some(const conv_place *at, const int P, const int R, float *to) {
    const int Q = (int)OUTPUTS / LANES; /* registers of channels whose weights lie together */
    lanes total[MOST_PIXELS][BLOCK / LANES];
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int q = 0; q < Q * R; ++q) total[p][q] = (lanes){0};
    for (uint32_t i = 0; i < at->rows; ++i)
        for (uint32_t run = 0; run < at->runs; ++run) {
            const float *in = at->in + i * at->row + run * at->run;
            const float *weight = at->weight + i * at->weight_row + run * at->weight_run;
            for (const float *end = in + at->length; in < end; ++in, weight += OUTPUTS) {
                lanes w[BLOCK / LANES];
                UNROLL for (int q = 0; q < Q * R; ++q)
                    w[q] = load_lanes(weight + (size_t)(q / Q) * at->weight_next + q % Q * LANES);
                UNROLL for (int p = 0; p < P; ++p) {
                    const lanes number = all_lanes(in[(size_t)p * at->step]);
                    UNROLL for (int q = 0; q < Q * R; ++q) total[p][q] = total[p][q] + number * w[q];
                }
            }
        }
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int q = 0; q < Q * R; ++q)
        store_lanes(to + (size_t)p * BLOCK + q * LANES, total[p][q]);
}

/* The same for n channels, R times OUTPUTS at a time and then OUTPUTS. */
INLINE void conv_channels(const conv_place *at, uint32_t n, const int P, const int R, abste_sums *sums) {
    conv_place here = *at;
    uint32_t m = 0;
    for (; R > 1 && m + R * OUTPUTS <= n; m += R * OUTPUTS, here.weight += (size_t)R * at->weight_next)
        conv_some(&here, P, R, sums->f + m);
    for (; m < n; m += OUTPUTS, here.weight += at->weight_next)
        conv_some(&here, P, 1, sums->f + m);
}

#endif
