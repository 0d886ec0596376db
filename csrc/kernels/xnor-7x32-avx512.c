/* xnor for AVX-512 with VPOPCNTDQ: seven pixels by two registers of sixteen channels, or four by four.
 *
 * A lane of a register is one output channel: 32 of its weights meet 32 input bits that all lanes share. The weights of a block of
 * 64 channels lie tap after tap, word after word, 64 words each, so that the kernel reads them from front to back.
 */
#include "../src/internal.h"

#ifdef ABSTE_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,bmi2")))

/* Taps of one row of the kernel that lie next to each other in the input, and so in the weight. */
typedef struct {
    const uint32_t *in, *weight;
    uint32_t words;
} run_of_taps;

#define MOST_RUNS 64u

/* Where sums go: through thresholds to bits, if there are any, or to `sums`. */
typedef struct {
    abste_sums *sums;
    const int32_t *thresholds; /* pairs, from the first channel of 32 on */
    uint32_t *bits;            /* the word of those 32 channels of the first pixel; `words` further is the next pixel */
    size_t words;
    uint32_t some; /* a bit for each of the 32 channels that exists */
    uint32_t first;
} destination;

/* Pairs of a threshold and its direction, taken apart. */
TARGET static inline void thresholds(const int32_t *pairs, __mmask16 some, __m512i *t, __m512i *d) {
    const uint32_t twice = _pdep_u32(some, 0x55555555u) * 3;
    const __m512i a = _mm512_maskz_loadu_epi32((__mmask16)twice, pairs);
    const __m512i b = _mm512_maskz_loadu_epi32((__mmask16)(twice >> 16), pairs + 16);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    *t = _mm512_permutex2var_epi32(a, even, b);
    *d = _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
}

/* `taps` - 2 (set bits of input ^ weight) for P pixels, `step` words apart, and two registers of channels; the weights of a word
 * lie together, BLOCK of them. */
#define KERNEL(P)                                                                                                               \
    TARGET static void count_##P(const run_of_taps *runs, uint32_t count, size_t step, int32_t taps, const destination *to) {   \
        __m512i total[P][2];                                                                                                    \
        UNROLL for (int p = 0; p < P; ++p) total[p][0] = total[p][1] = _mm512_setzero_si512();                                  \
        for (uint32_t r = 0; r < count; ++r) {                                                                                  \
            const uint32_t *in = runs[r].in, *weight = runs[r].weight + to->first;                                              \
            for (uint32_t t = 0; t < runs[r].words; ++t, weight += BLOCK) {                                                     \
                const __m512i w0 = _mm512_load_si512(weight), w1 = _mm512_load_si512(weight + 16);                              \
                UNROLL for (int p = 0; p < P; ++p) {                                                                            \
                    const __m512i bits = _mm512_set1_epi32((int32_t)in[p * step + t]);                                          \
                    total[p][0] = _mm512_add_epi32(total[p][0], _mm512_popcnt_epi32(_mm512_xor_si512(w0, bits)));               \
                    total[p][1] = _mm512_add_epi32(total[p][1], _mm512_popcnt_epi32(_mm512_xor_si512(w1, bits)));               \
                }                                                                                                               \
            }                                                                                                                   \
        }                                                                                                                       \
        const __m512i all = _mm512_set1_epi32(taps);                                                                            \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < 2; ++o)                                                   \
            total[p][o] = _mm512_sub_epi32(all, _mm512_slli_epi32(total[p][o], 1));                                             \
        if (to->thresholds) {                                                                                                   \
            __m512i t[2], d[2];                                                                                                 \
            UNROLL for (int o = 0; o < 2; ++o)                                                                                  \
                thresholds(to->thresholds + 32 * o, (__mmask16)(to->some >> 16 * o), &t[o], &d[o]);                             \
            const __mmask16 n0 = _mm512_movepi32_mask(d[0]), n1 = _mm512_movepi32_mask(d[1]);                                   \
            const __m512i zero = _mm512_setzero_si512();                                                                        \
            UNROLL for (int p = 0; p < P; ++p) { /* d * sum >= t */                                                             \
                const __m512i s0 = _mm512_mask_sub_epi32(total[p][0], n0, zero, total[p][0]);                                   \
                const __m512i s1 = _mm512_mask_sub_epi32(total[p][1], n1, zero, total[p][1]);                                   \
                const uint32_t low = _mm512_cmpge_epi32_mask(s0, t[0]), high = _mm512_cmpge_epi32_mask(s1, t[1]);               \
                to->bits[p * to->words] = (low | high << 16) & to->some;                                                        \
            }                                                                                                                   \
        } else {                                                                                                                \
            UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < 2; ++o)                                               \
                _mm512_store_si512(to->sums[p].i + to->first + 16 * o, total[p][o]);                                            \
        }                                                                                                                       \
    }

KERNEL(1)
KERNEL(2)
KERNEL(3)
KERNEL(4)
KERNEL(5)
KERNEL(6)
KERNEL(7)

typedef void (*counter)(const run_of_taps *, uint32_t, size_t, int32_t, const destination *);
static const counter COUNTERS[8] = {NULL, count_1, count_2, count_3, count_4, count_5, count_6, count_7};
#define MOST_PIXELS 7u

static uint32_t words_per_tap(const abste_model *model, const abste_node_record *node) {
    return words_of(value_at(model, node->in0)->c / node->groups);
}

static size_t packed_bytes(const abste_model *model, const abste_node_record *node) {
    if (node->op != OP_XNOR || node->groups != 1 || (uint32_t)node->kernel[0] * node->kernel[1] > MOST_RUNS)
        return 0;
    const uint64_t blocks = (written_by(model, node)->c + BLOCK - 1) / BLOCK;
    return (size_t)(blocks * BLOCK * node->kernel[0] * node->kernel[1] * words_per_tap(model, node) * 4);
}

static uint32_t bits_at(const uint32_t *string, uint64_t at, uint32_t count) {
    const uint32_t shift = at % 32;
    const uint32_t *word = string + at / 32;
    uint32_t bits = word[0] >> shift;
    if (shift + count > 32)
        bits |= word[1] << (32 - shift);
    return count == 32 ? bits : bits & ((1u << count) - 1);
}

/* Bits beyond the channels are zero, as they are in the input, and count for nothing; so do lanes beyond the last channel. */
static void pack(const abste_model *model, const abste_node_record *node, void *memory) {
    const uint32_t C = value_at(model, node->in0)->c, c = written_by(model, node)->c;
    const uint32_t taps = (uint32_t)node->kernel[0] * node->kernel[1], words = words_per_tap(model, node);
    const uint32_t *weight = blob_data(model, node->weight);
    uint32_t *out = memory;
    for (uint32_t o = 0; o < c; o += BLOCK)
        for (uint32_t tap = 0; tap < taps; ++tap)
            for (uint32_t word = 0; word < words; ++word)
                for (uint32_t m = 0; m < BLOCK; ++m) {
                    const uint32_t left = C - 32 * word, count = left < 32 ? left : 32;
                    const uint64_t at = ((uint64_t)(o + m) * taps + tap) * C + 32 * word;
                    *out++ = o + m < c ? bits_at(weight, at, count) : 0;
                }
}

static void xnor(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) {
    const abste_node_record *node = job->node;
    const uint32_t kh = node->kernel[0], kw = node->kernel[1], words = job->words;
    const uint32_t *weights = (const uint32_t *)job->packed + (size_t)o * kh * kw * words;
    const int64_t row = (int64_t)y * node->stride[0] - node->padding[0];
    const int64_t reach = (int64_t)(kw - 1) * node->dilation[1];
    const abste_range is = taps_inside(row, kh, node->dilation[0], job->H);
    const size_t step = (size_t)node->stride[1] * words;
    _Alignas(64) abste_sums sums[MOST_PIXELS];
    destination to = {.sums = sums, .words = words_of(job->c)};
    const int32_t *pairs = NULL;
    if (node->step_count && step_at(job->model, node->first_step)->kind == STEP_THRESHOLD && !job->arguments->trace_count)
        pairs = (const int32_t *)blob_data(job->model, step_at(job->model, node->first_step)->a) + 2 * (size_t)o;
    for (uint32_t x = 0; x < job->w;) {
        const int64_t column = (int64_t)x * node->stride[1] - node->padding[1];
        const abste_range js = taps_inside(column, kw, node->dilation[1], job->W);
        /* As many pixels as have the same taps inside. */
        uint32_t pixels = 1;
        if (js.first == 0 && js.last == kw) {
            const uint32_t alike = (uint32_t)((job->W - 1 - reach - column) / node->stride[1]) + 1;
            pixels = alike < job->w - x ? alike : job->w - x;
        }
        if (node->pad_value && (is.first || is.last < kh || js.first || js.last < kw)) {
            for (uint32_t p = 0; p < pixels; ++p) { /* taps outside count here */
                job->kernel(job, y, x + p, o, n, sums);
                job->finish(job, y, x + p, 1, o, n, sums);
            }
            x += pixels;
            continue;
        }
        run_of_taps runs[MOST_RUNS];
        uint32_t count = 0;
        const uint32_t together = node->dilation[1] == 1 ? js.last - js.first : 1; /* taps of a row that follow each other */
        for (uint32_t i = is.first; i < is.last; ++i)
            for (uint32_t j = js.first; j < js.last; j += together) {
                const size_t r = (size_t)(row + (int64_t)i * node->dilation[0]);
                const size_t s = (size_t)(column + (int64_t)j * node->dilation[1]);
                runs[count].in = job->bits + (r * job->W + s) * words;
                runs[count].weight = weights + ((size_t)i * kw + j) * words * BLOCK;
                runs[count++].words = together * words;
            }
        const int32_t taps = (int32_t)((is.last - is.first) * (js.last - js.first) * job->C);
        for (const uint32_t end = x + pixels; x < end;) {
            const uint32_t some = end - x < MOST_PIXELS ? end - x : MOST_PIXELS;
            for (uint32_t first = 0; first < n; first += 32) {
                to.first = first;
                if (pairs) {
                    to.thresholds = pairs + 2 * first;
                    to.bits = job->out_bits + ((size_t)y * job->w + x) * to.words + (o + first) / 32;
                    to.some = n - first < 32 ? (1u << (n - first)) - 1 : 0xFFFFFFFFu;
                }
                COUNTERS[some](runs, count, step, taps, &to);
            }
            if (!pairs)
                job->finish(job, y, x, some, o, n, sums);
            for (uint32_t r = 0; r < count; ++r)
                runs[r].in += some * step;
            x += some;
        }
    }
}

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
                case STEP_ADD_VALUE:                                                                                            \
                    EACH(v[p] = _mm512_add_ps(                                                                                  \
                             v[p], _mm512_maskz_loadu_ps(some, operand_at(job, step, at->y, at->x + (uint32_t)p) + o)))         \
                    break;                                                                                                      \
                case STEP_MULTIPLY_VALUE:                                                                                       \
                    EACH(v[p] = _mm512_mul_ps(                                                                                  \
                             v[p], _mm512_maskz_loadu_ps(some, operand_at(job, step, at->y, at->x + (uint32_t)p) + o)))         \
                    break;                                                                                                      \
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

const abste_variant abste_variant_avx512 = {
    .packed_bytes = packed_bytes, .pack = pack, .rows = {[OP_XNOR] = xnor}, .finish = finish};
#endif
