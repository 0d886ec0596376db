/* Steps with AVX-512, and the table of its kernels. */
#include "avx512.h"

#ifdef ABSTE_X86
/* Steps: sixteen channels of P pixels at a time, in registers from the sums to what is stored. */

typedef struct {
    const abste_job *job;
    uint32_t y, x, o, n;
    abste_sums *sums;
} piece;

#define FINISH(P)                                                                                                               \
    TARGET static void finish_##P(const piece *at) {                                                                            \
        const abste_job *job = at->job;                                                                                         \
        const abste_node_record *node = job->node;                                                                              \
        const abste_step_record *steps = node->step_count ? step_at(job->model, node->first_step) : NULL;                       \
        const size_t pixel = (size_t)at->y * job->w + at->x;                                                                    \
        const __m512 zero = _mm512_setzero_ps();                                                                                \
        uint16_t set[P][BLOCK / 16]; /* a bit for each channel that is at least 0 */                                            \
        for (uint32_t k = 0; k < at->n; k += 16) {                                                                              \
            const uint32_t o = at->o + k;                                                                                       \
            const __mmask16 some = at->n - k < 16 ? (__mmask16)((1u << (at->n - k)) - 1) : (__mmask16)0xFFFF;                   \
            __m512 v[P];                                                                                                        \
            if (node->op == OP_XNOR && steps && steps->kind == STEP_THRESHOLD) {                                                \
                __m512i t, d;                                                                                                   \
                thresholds((const int32_t *)blob_data(job->model, steps->a) + 2 * (size_t)o, some, &t, &d);                     \
                const __mmask16 negative = _mm512_movepi32_mask(d);                                                             \
                UNROLL for (int p = 0; p < P; ++p) { /* d * sum >= t; no floats are written */                                         \
                    const __m512i sum = _mm512_load_si512(at->sums[p].i + k);                                                   \
                    const __m512i turned = _mm512_mask_sub_epi32(sum, negative, _mm512_setzero_si512(), sum);                   \
                    set[p][k / 16] = _mm512_mask_cmpge_epi32_mask(some, turned, t);                                             \
                }                                                                                                               \
                continue;                                                                                                       \
            }                                                                                                                   \
            UNROLL for (int p = 0; p < P; ++p)                                                                                         \
                v[p] = node->op == OP_XNOR ? _mm512_cvtepi32_ps(_mm512_load_si512(at->sums[p].i + k))                           \
                                           : _mm512_load_ps(at->sums[p].f + k);                                                 \
            for (uint32_t s = 0; s < node->step_count; ++s) {                                                                   \
                const abste_step_record *step = &steps[s];                                                                      \
                switch (step->kind) {                                                                                           \
                case STEP_AFFINE: {                                                                                             \
                    const __m512 a = blob_lanes(job, step->a, o, some), b = blob_lanes(job, step->b, o, some);                  \
                    EACH(v[p] = _mm512_add_ps(_mm512_mul_ps(v[p], a), b))                                                       \
                    break;                                                                                                      \
                }                                                                                                               \
                case STEP_MULTIPLY: {                                                                                           \
                    const __m512 a = blob_lanes(job, step->a, o, some);                                                         \
                    EACH(v[p] = _mm512_mul_ps(v[p], a))                                                                         \
                    break;                                                                                                      \
                }                                                                                                               \
                case STEP_ADD: {                                                                                                \
                    const __m512 a = blob_lanes(job, step->a, o, some);                                                         \
                    EACH(v[p] = _mm512_add_ps(v[p], a))                                                                         \
                    break;                                                                                                      \
                }                                                                                                               \
                case STEP_PRELU: {                                                                                              \
                    const __m512 a = blob_lanes(job, step->a, o, some);                                                         \
                    EACH(v[p] = _mm512_mask_mul_ps(v[p], _mm512_cmp_ps_mask(v[p], zero, _CMP_LT_OQ), v[p], a))                  \
                    break;                                                                                                      \
                }                                                                                                               \
                case STEP_ADD_VALUE: {                                                                                          \
                    size_t next;                                                                                                \
                    const float *a = operand_at(job, step, at->y, at->x, &next) + o;                                            \
                    EACH(v[p] = _mm512_add_ps(v[p], _mm512_maskz_loadu_ps(some, a + (size_t)p * next)))                         \
                    break;                                                                                                      \
                }                                                                                                               \
                case STEP_MULTIPLY_VALUE: {                                                                                     \
                    size_t next;                                                                                                \
                    const float *a = operand_at(job, step, at->y, at->x, &next) + o;                                            \
                    EACH(v[p] = _mm512_mul_ps(v[p], _mm512_maskz_loadu_ps(some, a + (size_t)p * next)))                         \
                    break;                                                                                                      \
                }                                                                                                               \
                case STEP_RELU:                                                                                                 \
                    EACH(v[p] = _mm512_mask_mov_ps(v[p], _mm512_cmp_ps_mask(v[p], zero, _CMP_LT_OQ), zero))                     \
                    break;                                                                                                      \
                case STEP_CLAMP: {                                                                                              \
                    const __m512 low = _mm512_set1_ps(step->p), high = _mm512_set1_ps(step->q);                                 \
                    EACH(v[p] = clamp(v[p], low, high))                                                                         \
                    break;                                                                                                      \
                }                                                                                                               \
                case STEP_SIGN:                                                                                                 \
                    EACH(v[p] = _mm512_mask_mov_ps(_mm512_set1_ps(-1.0f), _mm512_cmp_ps_mask(v[p], zero, _CMP_GE_OQ),           \
                                                   _mm512_set1_ps(1.0f)))                                                       \
                    break;                                                                                                      \
                default: /* functions: the scalar code has them */                                                              \
                    EACH({                                                                                                      \
                        float numbers[16];                                                                                      \
                        _mm512_storeu_ps(numbers, v[p]);                                                                        \
                        abste_apply_scalar(job, step, at->y, at->x + (uint32_t)p, o, at->n - k < 16 ? at->n - k : 16, numbers); \
                        v[p] = _mm512_loadu_ps(numbers);                                                                        \
                    })                                                                                                          \
                }                                                                                                               \
            }                                                                                                                   \
            UNROLL for (int p = 0; p < P; ++p) {                                                                                       \
                if (job->out)                                                                                                   \
                    _mm512_mask_storeu_ps(job->out + (pixel + (size_t)p) * job->c + o, some, v[p]);                             \
                set[p][k / 16] = _mm512_mask_cmp_ps_mask(some, v[p], zero, _CMP_GE_OQ);                                         \
            }                                                                                                                   \
        }                                                                                                                       \
        if (job->out_bits)                                                                                                      \
            UNROLL for (int p = 0; p < P; ++p) {                                                                                       \
                uint32_t *bits = job->out_bits + (pixel + (size_t)p) * words_of(job->c) + at->o / 32;                           \
                for (uint32_t m = 0; m < at->n; m += 32)                                                                        \
                    bits[m / 32] = set[p][m / 16] | (at->n - m > 16 ? (uint32_t)set[p][m / 16 + 1] << 16 : 0);                  \
            }                                                                                                                   \
    }
#define EACH(action)                                                                                                            \
    UNROLL for (int p = 0; p < PIXELS_HERE; ++p)                                                                                       \
        action;

TARGET static inline __m512 blob_lanes(const abste_job *job, uint32_t blob, uint32_t o, __mmask16 some) {
    return _mm512_maskz_loadu_ps(some, (const float *)blob_data(job->model, blob) + o);
}

TARGET static inline __m512 clamp(__m512 v, __m512 low, __m512 high) {
    const __mmask16 below = _mm512_cmp_ps_mask(v, low, _CMP_LT_OQ), above = _mm512_cmp_ps_mask(v, high, _CMP_GT_OQ);
    return _mm512_mask_mov_ps(_mm512_mask_mov_ps(v, above, high), below, low);
}

#define PIXELS_HERE 7
FINISH(7)
#undef PIXELS_HERE
#define PIXELS_HERE 4
FINISH(4)
#undef PIXELS_HERE
#define PIXELS_HERE 1
FINISH(1)

static void finish(const abste_job *job, uint32_t y, uint32_t x, uint32_t pixels, uint32_t o, uint32_t n, abste_sums *sums) {
    piece at = {job, y, x, o, n, sums};
    while (pixels) {
        const uint32_t some = pixels >= 7 ? 7 : pixels >= 4 ? 4 : 1;
        (some == 7 ? finish_7 : some == 4 ? finish_4 : finish_1)(&at);
        at.x += some, at.sums += some, pixels -= some;
    }
}

static size_t packed_bytes(const abste_model *model, const abste_node_record *node) {
    return node->op == OP_XNOR                        ? abste_xnor_bytes_avx512(model, node)
           : node->op == OP_SIGN_CONV                 ? abste_sign_conv_bytes_avx512(model, node)
           : node->op == OP_CONV && node->groups == 1 ? abste_conv_bytes_avx512(model, node)
                                                      : 0;
}

static void pack(const abste_model *model, const abste_node_record *node, void *memory) {
    (node->op == OP_XNOR        ? abste_xnor_pack_avx512
     : node->op == OP_SIGN_CONV ? abste_sign_conv_pack_avx512
                                : abste_conv_pack_avx512)(model, node, memory);
}

const abste_variant abste_variant_avx512 = {.packed_bytes = packed_bytes,
                                            .pack = pack,
                                            .rows = {[OP_CONV] = abste_conv_avx512,
                                                     [OP_SIGN_CONV] = abste_sign_conv_avx512,
                                                     [OP_XNOR] = abste_xnor_avx512},
                                            .whole = {[OP_SIGN_CONV] = 1},
                                            .int8 = {abste_int8_bytes_avx512, abste_int8_pack_avx512, abste_int8_most_avx512,
                                                     abste_int8_row_avx512, abste_int8_avx512},
                                            .finish = finish};
#endif
