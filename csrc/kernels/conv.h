/* conv in registers of floats of any width (lanes.h): some pixels by some registers of output channels. A product is rounded before it
 * is added, as docs/format.md wants. The file that includes this has also defined TOTALS, how many sums stay in registers: 4, 2 or 1
 * pixels by so many registers that they make TOTALS, at most eight or all of a BLOCK. */
#ifndef ABSTE_CONV_H
#define ABSTE_CONV_H

#include "lanes.h"

typedef struct {
    const abste_job *job;
    const float *in; /* under the first tap inside, of the first pixel; `step` further that of the next one */
    size_t step, weight;
    uint32_t is, js, count;                              /* taps, and inputs that lie side by side under each */
    size_t in_row, in_column, weight_row, weight_column; /* from tap to tap */
} conv_place;

/* `some` weights, from number `at` on. */
INLINE lanes conv_weights(const abste_job *job, size_t at, const int half, uint32_t some) {
    if (some < LANES) {
        float numbers[LANES] = {0};
        for (uint32_t m = 0; m < some; ++m)
            numbers[m] = half ? abste_from_half(((const uint16_t *)job->weight)[at + m]) : ((const float *)job->weight)[at + m];
        return load_lanes(numbers);
    }
    return half ? (lanes)FROM_HALVES((const uint16_t *)job->weight + at) : load_lanes((const float *)job->weight + at);
}

/* P pixels by O registers, the first one from output channel `o` on, of which `some` lanes exist; sums of a pixel go to `to`, `next`
 * further those of the next one. */
INLINE void conv_some(const conv_place *at, uint32_t o, const int P, const int O, const int half, uint32_t some, float *to, size_t next) {
    lanes total[TOTALS];
    UNROLL for (int k = 0; k < P * O; ++k) total[k] = (lanes){0};
    for (uint32_t i = 0; i < at->is; ++i)
        for (uint32_t j = 0; j < at->js; ++j) {
            const float *in = at->in + i * at->in_row + j * at->in_column;
            size_t weight = at->weight + i * at->weight_row + j * at->weight_column + o;
            for (const float *end = in + at->count; in < end; ++in, weight += at->job->c) {
                lanes w[BLOCK / LANES];
                UNROLL for (int q = 0; q < O; ++q) w[q] = conv_weights(at->job, weight + (size_t)q * LANES, half, some);
                UNROLL for (int p = 0; p < P; ++p) {
                    const lanes number = all_lanes(in[(size_t)p * at->step]);
                    UNROLL for (int q = 0; q < O; ++q) total[p * O + q] = total[p * O + q] + number * w[q];
                }
            }
        }
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int q = 0; q < O; ++q)
        store_lanes(to + (size_t)p * next + q * LANES, total[p * O + q]);
}

/* Channels [o, o + n) of P pixels. Where the last register would reach beyond them, it begins earlier. */
INLINE void conv_block(const conv_place *at, uint32_t o, uint32_t n, const int P, const int half, abste_sums *sums) {
    const int most = BLOCK / LANES < 8 ? BLOCK / LANES : 8, O = TOTALS / P < most ? TOTALS / P : most; /* weights want registers too */
    uint32_t m = 0;
    for (; n - m >= (uint32_t)O * LANES; m += (uint32_t)O * LANES)
        conv_some(at, o + m, P, O, half, LANES, sums->f + m, BLOCK);
    for (; m < n; m += LANES) {
        const uint32_t some = n - m < LANES ? n - m : LANES, before = LANES - some;
        if (before > o + m) { /* there are not so many channels */
            conv_some(at, o + m, P, 1, half, some, sums->f + m, BLOCK);
            continue;
        }
        float last[4 * LANES];
        conv_some(at, o + m - before, P, 1, half, LANES, last, LANES);
        for (int p = 0; p < P; ++p)
            for (uint32_t k = 0; k < some; ++k)
                sums[p].f[m + k] = last[(uint32_t)p * LANES + before + k];
    }
}

typedef void (*conv_counter)(const conv_place *at, uint32_t o, uint32_t n, abste_sums *sums);
#define CONV(P)                                                                                         \
    TARGET static void conv_##P(const conv_place *at, uint32_t o, uint32_t n, abste_sums *sums) {       \
        conv_block(at, o, n, P, 0, sums);                                                               \
    }                                                                                                   \
    TARGET static void conv_half_##P(const conv_place *at, uint32_t o, uint32_t n, abste_sums *sums) {  \
        conv_block(at, o, n, P, 1, sums);                                                               \
    }
CONV(1)
CONV(2)
CONV(4)
#undef CONV

static inline void conv_row(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) {
    static const conv_counter counters[2][3] = {{conv_1, conv_2, conv_4}, {conv_half_1, conv_half_2, conv_half_4}};
    const abste_node_record *node = job->node;
    const uint32_t kw = node->kernel[1];
    const int64_t row = (int64_t)y * node->stride[0] - node->padding[0];
    const abste_range is = taps_inside(row, node->kernel[0], node->dilation[0], job->H);
    const size_t tap = (size_t)job->C * job->c, line = (size_t)job->W * job->C;
    conv_place at = {.job = job, .step = (size_t)node->stride[1] * job->C};
    at.in_row = node->dilation[0] * line, at.in_column = (size_t)node->dilation[1] * job->C;
    at.weight_row = kw * tap, at.weight_column = tap;
    _Alignas(64) abste_sums sums[4];
    for (uint32_t x = 0; x < job->w;) {
        const int64_t column = (int64_t)x * node->stride[1] - node->padding[1];
        const abste_range js = taps_inside(column, kw, node->dilation[1], job->W);
        at.is = js.first < js.last ? is.last - is.first : 0;
        at.js = js.last - js.first, at.count = job->C;
        if (node->dilation[1] == 1) /* taps of a row follow each other */
            at.count *= at.js, at.js = 1;
        at.in = job->in;
        if (at.is)
            at.in += (size_t)(row + (int64_t)is.first * node->dilation[0]) * line +
                     (size_t)(column + (int64_t)js.first * node->dilation[1]) * job->C;
        at.weight = ((size_t)is.first * kw + js.first) * tap;
        for (const uint32_t end = x + pixels_alike(job, column, js, job->w - x); x < end;) {
            const uint32_t two = end - x >= 4 ? 2 : end - x >= 2 ? 1 : 0, pixels = 1u << two;
            counters[job->half][two](&at, o, n, sums);
            job->finish(job, y, x, pixels, o, n, sums);
            at.in += pixels * at.step;
            x += pixels;
        }
    }
}

#endif
