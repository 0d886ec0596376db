/* Steps in registers of floats of any width (lanes.h): some pixels by one register at a time. */
#ifndef ABSTE_STEPS_H
#define ABSTE_STEPS_H

#include "lanes.h"

/* The functions of docs/format.md, operation by operation. */

INLINE lanes clamped(lanes v, lanes low, lanes high) { return SELECT(LESS(v, low), low, SELECT(LESS(high, v), high, v)); }

INLINE lanes exp_of(lanes x) {
    x = clamped(x, all_lanes(-87.0f), all_lanes(88.0f));
    const lanes zero = {0}, t = x * 1.44269504f + 0.5f;
    lanes n = __builtin_convertvector(__builtin_convertvector(SELECT(AT_LEAST(t, t), t, zero), ilanes), lanes); /* NaN is no integer */
    n = SELECT(LESS(t, n), n - 1.0f, n);
    const ilanes whole = __builtin_convertvector(n, ilanes);
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
    const lanes zero = {0}, a = SELECT(LESS(x, zero), -x, x);
    const lanes t = 1.0f / (1.0f + 0.3275911f * a);
    lanes p = 1.061405429f * t + -1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t + -0.284496736f;
    p = p * t + 0.254829592f;
    const lanes y = 1.0f - (p * t) * exp_of(-(a * a));
    return SELECT(LESS(x, zero), -y, y);
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

/* The steps of P neighbouring pixels and the channels from o on, of which there are `some`. */
INLINE void step_lanes(const abste_job *job, uint32_t y, uint32_t x, uint32_t o, uint32_t some, const int P, lanes *v) {
    const lanes zero = {0};
    const size_t pixel = (size_t)y * job->w + x;
    for (const abste_step *step = job->steps, *end = step + job->node->step_count; step < end; ++step) {
        switch (step->kind) {
        case STEP_AFFINE: {
            const lanes times = load_some(step->a + o, some), plus = load_some(step->b + o, some);
            EACH(v[p] = v[p] * times + plus);
            break;
        }
        case STEP_MULTIPLY: {
            const lanes times = load_some(step->a + o, some);
            EACH(v[p] = v[p] * times);
            break;
        }
        case STEP_ADD: {
            const lanes plus = load_some(step->a + o, some);
            EACH(v[p] = v[p] + plus);
            break;
        }
        case STEP_PRELU: {
            const lanes times = load_some(step->a + o, some);
            EACH(v[p] = SELECT(LESS(v[p], zero), v[p] * times, v[p]));
            break;
        }
        case STEP_ADD_VALUE:
            EACH(v[p] = v[p] + load_some(step->a + o + (pixel + (size_t)p) * step->next, some));
            break;
        case STEP_MULTIPLY_VALUE:
            EACH(v[p] = v[p] * load_some(step->a + o + (pixel + (size_t)p) * step->next, some));
            break;
        case STEP_RELU: {
            const lanes nothing = all_lanes(step->p); /* 0, as abste_load has seen, but not the compiler: see abste_apply_scalar */
            EACH(v[p] = WHERE_NOT(LESS(v[p], nothing), v[p]));
            break;
        }
        case STEP_CLAMP: {
            const lanes low = all_lanes(step->p), high = all_lanes(step->q);
            EACH(v[p] = clamped(v[p], low, high));
            break;
        }
        case STEP_SIGN: {
            const lanes plus = all_lanes(1.0f), minus = all_lanes(-1.0f);
            EACH(v[p] = SELECT(AT_LEAST(v[p], zero), plus, minus));
            break;
        }
        default:
            EACH(v[p] = function_of(step->kind, v[p]));
        }
    }
}

/* To where the node writes floats. */
INLINE void store_pixels(const abste_job *job, uint32_t y, uint32_t x, uint32_t o, uint32_t some, const int P, const lanes *v) {
    if (job->out) {
        float *out = job->out + ((size_t)y * job->w + x) * job->c + o;
        EACH(store_some(out + (size_t)p * job->c, v[p], some));
    }
}

#endif
