/* Steps in registers of floats of any width (lanes.h): some pixels by one register at a time, from the sums to what is stored. */
#ifndef ABSTE_STEPS_H
#define ABSTE_STEPS_H

#include "lanes.h"

typedef struct {
    const abste_job *job;
    uint32_t y, x, o, n;
    abste_sums *sums;
} piece;

/* The functions of docs/format.md, operation by operation. */

INLINE lanes clamped(lanes v, lanes low, lanes high) { return SELECT(v < low, low, SELECT(v > high, high, v)); }

INLINE lanes exp_of(lanes x) {
    x = clamped(x, all_lanes(-87.0f), all_lanes(88.0f));
    const lanes t = x * 1.44269504f + 0.5f;
    ilanes whole = __builtin_convertvector((lanes)((ilanes)t & (t == t)), ilanes); /* NaN is no integer */
    whole += __builtin_convertvector(whole, lanes) > t;
    const lanes n = __builtin_convertvector(whole, lanes);
    lanes r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return ((p * (r * r) + r) + 1.0f) * (lanes)((whole + 127) << 23);
}

INLINE lanes sigmoid_of(lanes x) { return 1.0f / (1.0f + exp_of(-x)); }

INLINE lanes tanh_of(lanes x) { return 1.0f - 2.0f / (exp_of(2.0f * x) + 1.0f); }

INLINE lanes erf_of(lanes x) {
    const lanes zero = {0}, a = SELECT(x < zero, -x, x);
    const lanes t = 1.0f / (1.0f + 0.3275911f * a);
    lanes p = 1.061405429f * t + -1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t + -0.284496736f;
    p = p * t + 0.254829592f;
    const lanes y = 1.0f - (p * t) * exp_of(-(a * a));
    return SELECT(x < zero, -y, y);
}

INLINE lanes gate_of(lanes v) { return clamped(v + 3.0f, all_lanes(0), all_lanes(6.0f)); } /* of the hard functions */

/* One step of a kind that has no operand: too long to be written out for every pixel. */
TARGET __attribute__((noinline)) static lanes function_of(int kind, lanes v) {
    switch (kind) {
    case STEP_GELU:
        return (0.5f * v) * (1.0f + erf_of(v * 0.70710678f));
    case STEP_GELU_TANH:
        return (0.5f * v) * (1.0f + tanh_of(0.79788456f * (v + 0.044715f * ((v * v) * v))));
    case STEP_SILU:
        return v * sigmoid_of(v);
    case STEP_SIGMOID:
        return sigmoid_of(v);
    case STEP_HARDSWISH:
        return (v * gate_of(v)) / 6.0f;
    case STEP_HARDSIGMOID:
        return gate_of(v) / 6.0f;
    case STEP_TANH:
        return tanh_of(v);
    default: /* abste_load lets no other pass */
        return v;
    }
}

#define EACH(action) UNROLL for (int p = 0; p < P; ++p) action

INLINE void finish_some(const piece *at, const int P) {
    const abste_job *job = at->job;
    const abste_node_record *node = job->node;
    const abste_step_record *steps = node->step_count ? step_at(job->model, node->first_step) : NULL;
    const size_t pixel = (size_t)at->y * job->w + at->x;
    const lanes zero = {0};
    uint32_t set[8][BLOCK / 32]; /* a bit for each channel that is at least 0 */
    EACH(set[p][0] = set[p][1] = 0);
    for (uint32_t k = 0; k < at->n; k += LANES) {
        const uint32_t o = at->o + k, some = at->n - k < LANES ? at->n - k : LANES;
        lanes v[8];
        if (node->op == OP_XNOR && steps && steps->kind == STEP_THRESHOLD) {
            const int32_t *pairs = (const int32_t *)blob_data(job->model, steps->a) + 2 * (size_t)o;
            ilanes t = {0}, minus = {0};
            for (uint32_t m = 0; m < some; ++m)
                t[m] = pairs[2 * m], minus[m] = pairs[2 * m + 1] >> 31;
            EACH({ /* d * sum >= t; no floats are written */
                const ilanes sum = *(const loose_ilanes *)(const void *)(at->sums[p].i + k);
                set[p][k / 32] |= SET_BITS(((sum ^ minus) - minus) >= t) << k % 32;
            })
            continue;
        }
        EACH(v[p] = load_lanes(at->sums[p].f + k));
        if (node->op == OP_XNOR)
            EACH(v[p] = __builtin_convertvector((ilanes)v[p], lanes));
        for (uint32_t s = 0; s < node->step_count; ++s) {
            const abste_step_record *step = &steps[s];
            const float *a = NULL, *b = NULL;
            size_t next = 0;
            if (step->kind <= STEP_PRELU && step->kind != STEP_RELU)
                a = (const float *)blob_data(job->model, step->a) + o;
            switch (step->kind) {
            case STEP_AFFINE: {
                b = (const float *)blob_data(job->model, step->b) + o;
                const lanes times = load_some(a, some), plus = load_some(b, some);
                EACH(v[p] = v[p] * times + plus);
                break;
            }
            case STEP_MULTIPLY: {
                const lanes times = load_some(a, some);
                EACH(v[p] = v[p] * times);
                break;
            }
            case STEP_ADD: {
                const lanes plus = load_some(a, some);
                EACH(v[p] = v[p] + plus);
                break;
            }
            case STEP_PRELU: {
                const lanes times = load_some(a, some);
                EACH(v[p] = SELECT(v[p] < zero, v[p] * times, v[p]));
                break;
            }
            case STEP_ADD_VALUE:
                a = operand_at(job, step, at->y, at->x, &next) + o;
                EACH(v[p] = v[p] + load_some(a + (size_t)p * next, some));
                break;
            case STEP_MULTIPLY_VALUE:
                a = operand_at(job, step, at->y, at->x, &next) + o;
                EACH(v[p] = v[p] * load_some(a + (size_t)p * next, some));
                break;
            case STEP_RELU: {
                const lanes nothing = all_lanes(step->p); /* 0, as abste_load has seen, but not the compiler: see abste_apply_scalar */
                EACH(v[p] = (lanes)((ilanes)v[p] & ~(v[p] < nothing)));
                break;
            }
            case STEP_CLAMP: {
                const lanes low = all_lanes(step->p), high = all_lanes(step->q);
                EACH(v[p] = clamped(v[p], low, high));
                break;
            }
            case STEP_SIGN: {
                const lanes plus = all_lanes(1.0f), minus = all_lanes(-1.0f);
                EACH(v[p] = SELECT(v[p] >= zero, plus, minus));
                break;
            }
            default:
                EACH(v[p] = function_of(step->kind, v[p]));
            }
        }
        if (job->out)
            EACH(store_some(job->out + (pixel + (size_t)p) * job->c + o, v[p], some));
        if (job->out_bits)
            EACH(set[p][k / 32] |= SET_BITS(v[p] >= zero) << k % 32);
    }
    if (job->out_bits)
        for (uint32_t m = 0; m < at->n; m += 32) {
            const uint32_t known = 0xFFFFFFFFu >> (at->n - m < 32 ? 32 - (at->n - m) : 0);
            EACH(job->out_bits[(pixel + (size_t)p) * words_of(job->c) + (at->o + m) / 32] = set[p][m / 32] & known);
        }
}

#undef EACH

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
