/* What reads a window channel by channel, in registers of floats of any width (lanes.h): pools, and convolutions with a group for each
 * channel. */
#ifndef ABSTE_WINDOW_H
#define ABSTE_WINDOW_H

#include "lanes.h"

#include <math.h>

#define WINDOWS 8u /* steps cost less for several pixels at a time */

/* Whether a convolution is one. */
static inline int is_depthwise(const abste_model *model, const abste_node_record *node) {
    return node->groups == value_at(model, node->in0)->c && node->groups == written_by(model, node)->c;
}

typedef struct {
    const abste_job *job;
    int64_t row, column; /* of tap (0, 0), where there may be nothing */
    abste_range is, js;
} window_place;

INLINE lanes window_weights(const abste_job *job, size_t at, uint32_t some) {
    if (!job->half)
        return load_some((const float *)job->weight + at, some);
    float numbers[LANES] = {0};
    for (uint32_t m = 0; m < some; ++m)
        numbers[m] = abste_from_half(((const uint16_t *)job->weight)[at + m]);
    return load_lanes(numbers);
}

/* Q registers of channels from o on, of which `some` lanes exist. */
INLINE void window_some(const window_place *at, const int op, uint32_t o, const int Q, uint32_t some, float *to) {
    const abste_job *job = at->job;
    const abste_node_record *node = job->node;
    lanes total[BLOCK / LANES];
    UNROLL for (int q = 0; q < Q; ++q) total[q] = op == OP_MAX_POOL ? all_lanes(-INFINITY) : (lanes){0};
    for (uint32_t i = at->is.first; i < at->is.last; ++i)
        for (uint32_t j = at->js.first; j < at->js.last; ++j) {
            const size_t r = (size_t)(at->row + (int64_t)i * node->dilation[0]), s = (size_t)(at->column + (int64_t)j * node->dilation[1]);
            const float *in = job->in + (r * job->W + s) * job->C + o;
            UNROLL for (int q = 0; q < Q; ++q) {
                const lanes v = load_some(in + q * LANES, some);
                if (op == OP_MAX_POOL) /* once NaN, no comparison replaces it */
                    total[q] = SELECT(AT_LEAST(total[q], v), total[q], SELECT(AT_LEAST(total[q], total[q]), v, total[q]));
                else if (op == OP_CONV)
                    total[q] = total[q] + v * window_weights(job, ((size_t)i * node->kernel[1] + j) * job->c + o + q * LANES, some);
                else
                    total[q] = total[q] + v;
            }
        }
    if (op == OP_AVERAGE_POOL) {
        const lanes divisor = all_lanes(abste_pool_divisor(job, at->row, at->column, at->is, at->js));
        UNROLL for (int q = 0; q < Q; ++q) total[q] = total[q] / divisor;
    }
    UNROLL for (int q = 0; q < Q; ++q) store_lanes(to + q * LANES, total[q]);
}

INLINE void window_row(const abste_job *job, const int op, uint32_t y, uint32_t o, uint32_t n) {
    const abste_node_record *node = job->node;
    const int Q = BLOCK / LANES < 8 ? BLOCK / LANES : 8;
    window_place at = {.job = job, .row = (int64_t)y * node->stride[0] - node->padding[0]};
    at.is = taps_inside(at.row, node->kernel[0], node->dilation[0], job->H);
    _Alignas(64) abste_sums sums[WINDOWS];
    for (uint32_t x = 0, waiting = 0; x < job->w; ++x) {
        at.column = (int64_t)x * node->stride[1] - node->padding[1];
        at.js = taps_inside(at.column, node->kernel[1], node->dilation[1], job->W);
        uint32_t m = 0;
        for (; n - m >= (uint32_t)Q * LANES; m += (uint32_t)Q * LANES)
            window_some(&at, op, o + m, Q, LANES, sums[waiting].f + m);
        for (; m < n; m += LANES)
            window_some(&at, op, o + m, 1, n - m < LANES ? n - m : LANES, sums[waiting].f + m);
        if (++waiting == WINDOWS || x + 1 == job->w) {
            job->finish(job, y, x + 1 - waiting, waiting, o, n, sums);
            waiting = 0;
        }
    }
}

TARGET static void max_pool_row(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) { window_row(job, OP_MAX_POOL, y, o, n); }
TARGET static void average_pool_row(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) { window_row(job, OP_AVERAGE_POOL, y, o, n); }
TARGET static void depthwise_row(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) { window_row(job, OP_CONV, y, o, n); }

static abste_row_kernel window_kernel(const abste_model *model, const abste_node_record *node) {
    return node->op == OP_MAX_POOL                            ? max_pool_row
           : node->op == OP_AVERAGE_POOL                      ? average_pool_row
           : node->op == OP_CONV && is_depthwise(model, node) ? depthwise_row
                                                              : NULL;
}

#endif
