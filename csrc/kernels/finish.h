/* From sums in memory through the steps to what a node writes, with registers of floats of any width (lanes.h). */
#ifndef ABSTE_FINISH_H
#define ABSTE_FINISH_H

#include "steps.h"

typedef struct {
    const abste_job *job;
    uint32_t y, x, o, n;
    abste_sums *sums;
} piece;

INLINE void finish_some(const piece *at, const int P) {
    const abste_job *job = at->job;
    const abste_node_record *node = job->node;
    const abste_step_record *first = node->step_count ? step_at(job->model, node->first_step) : NULL;
    const size_t pixel = (size_t)at->y * job->w + at->x;
    const lanes zero = {0};
    uint32_t set[8][BLOCK / 32]; /* a bit for each channel that is at least 0 */
    EACH(set[p][0] = set[p][1] = 0);
    for (uint32_t k = 0; k < at->n; k += LANES) {
        const uint32_t o = at->o + k, some = at->n - k < LANES ? at->n - k : LANES;
        if (node->op == OP_XNOR && first && first->kind == STEP_THRESHOLD) {
            const int32_t *pairs = (const int32_t *)blob_data(job->model, first->a) + 2 * (size_t)o;
            ilanes t = {0}, minus = {0};
            for (uint32_t m = 0; m < some; ++m)
                t[m] = pairs[2 * m], minus[m] = pairs[2 * m + 1] >> 31;
            EACH({ /* d * sum >= t; no floats are written */
                const ilanes sum = *(const loose_ilanes *)(const void *)(at->sums[p].i + k);
                set[p][k / 32] |= SET_BITS(AT_LEAST_INTEGER((sum ^ minus) - minus, t)) << k % 32;
            })
            continue;
        }
        lanes v[8];
        EACH(v[p] = load_lanes(at->sums[p].f + k));
        if (node->op == OP_XNOR)
            EACH(v[p] = __builtin_convertvector((ilanes)v[p], lanes));
        step_lanes(job, at->y, at->x, o, some, P, v);
        store_pixels(job, at->y, at->x, o, some, P, v);
        if (job->out_bits)
            EACH(set[p][k / 32] |= SET_BITS(AT_LEAST(v[p], zero)) << k % 32);
    }
    if (job->out_bits)
        for (uint32_t m = 0; m < at->n; m += 32) {
            const uint32_t known = 0xFFFFFFFFu >> (at->n - m < 32 ? 32 - (at->n - m) : 0);
            EACH(job->out_bits[(pixel + (size_t)p) * words_of(job->c) + (at->o + m) / 32] = set[p][m / 32] & known);
        }
}

/* What each instance does: neighbouring pixels, 8 and then 4, 2 and 1 at a time. */
TARGET static void finish_8(const piece *at) { finish_some(at, 8); }
TARGET static void finish_4(const piece *at) { finish_some(at, 4); }
TARGET static void finish_2(const piece *at) { finish_some(at, 2); }
TARGET static void finish_1(const piece *at) { finish_some(at, 1); }

static void finish(const abste_job *job, uint32_t y, uint32_t x, uint32_t pixels, uint32_t o, uint32_t n, abste_sums *sums) {
    piece at = {job, y, x, o, n, sums};
    while (pixels) {
        const uint32_t some = pixels >= 8 ? 8 : pixels >= 4 ? 4 : pixels >= 2 ? 2 : 1;
        (some == 8 ? finish_8 : some == 4 ? finish_4 : some == 2 ? finish_2 : finish_1)(&at);
        at.x += some, at.sums += some, pixels -= some;
    }
}

#endif
