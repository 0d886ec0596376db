/* Convolutions with inputs of eight bits for AVX-512 with VNNI: eight or seven pixels by two registers of sixteen channels.
 *
 * A lane of a register is one output channel: four of its weights meet four neighbouring inputs that all lanes share (vpdpbusd). That
 * instruction wants its shared operand unsigned, so inputs are stored with 128 added, and sums start at what that adds, subtracted.
 * Binary weights stay bits, and become bytes when they are read.
 */
#include "avx512.h"

#ifdef ABSTE_X86

#define OUTPUTS 32u /* channels at a time */
#define MOST_PIXELS 8u

/* Neighbouring inputs that a row of the kernel reads without a gap, and how often it does. */
typedef struct {
    uint32_t runs, bytes, fours;
} shape;

static shape shape_of(const abste_node_record *node, uint32_t C) {
    const uint32_t runs = node->dilation[1] == 1 ? 1 : node->kernel[1], bytes = node->kernel[1] / runs * C;
    return (shape){runs, bytes, (bytes + 3) / 4};
}

/* Whether weights stay bits. A bit is +1 or -1: where four reach beyond the run, bytes have to be zero. */
static int as_bits(const abste_node_record *node, shape it) { return node->op == OP_SIGN_CONV && it.bytes % 4 == 0; }

/* Per 32 channels: weights, per row of the kernel; what 128 adds to the sums of each row; scales. */
typedef struct {
    size_t row, weights, block;
} sizes;

static sizes sizes_of(const abste_node_record *node, shape it) {
    sizes s;
    s.row = (size_t)it.runs * it.fours * OUTPUTS * 4 / (as_bits(node, it) ? 8 : 1);
    s.weights = (s.row * node->kernel[0] + 63) / 64 * 64;
    s.block = s.weights + (node->kernel[0] + 1u) * OUTPUTS * sizeof(int32_t);
    return s;
}

static size_t bytes_of(const abste_model *model, const abste_node_record *node) {
    const uint32_t blocks = (written_by(model, node)->c + OUTPUTS - 1) / OUTPUTS;
    return blocks * sizes_of(node, shape_of(node, value_at(model, node->in0)->c)).block;
}

static void pack(const abste_model *model, const abste_node_record *node, void *memory) {
    const abste_job job = abste_job_of(model, node);
    const shape it = shape_of(node, job.C);
    const sizes s = sizes_of(node, it);
    const uint32_t kh = node->kernel[0], kw = node->kernel[1];
    const int bits = as_bits(node, it);
    uint8_t *out = memory;
    for (uint32_t o = 0; o < job.c; o += OUTPUTS, out += s.block) {
        int32_t *added = (int32_t *)(void *)(out + s.weights);
        float *scales = (float *)(void *)(added + kh * OUTPUTS);
        for (size_t k = 0; k < s.block; ++k)
            out[k] = 0;
        for (uint32_t m = 0; m < OUTPUTS && o + m < job.c; ++m) {
            float times = 0;
            scales[m] = node->op == OP_CONV ? abste_int8_scale(&job, o + m, &times) : 1;
            for (uint32_t i = 0; i < kh; ++i)
                for (uint32_t run = 0; run < it.runs; ++run)
                    for (uint32_t byte = 0; byte < it.bytes; ++byte) {
                        const uint32_t j = it.runs > 1 ? run : byte / job.C, k = byte % job.C;
                        const size_t tap = (size_t)i * kw + j;
                        int8_t weight;
                        if (node->op == OP_CONV)
                            weight = abste_int8_of(abste_weight(&job, (tap * job.C + k) * job.c + o + m), times);
                        else
                            weight = bits_at(job.weight, ((uint64_t)(o + m) * kh * kw + tap) * job.C + k, 1) ? 1 : -1;
                        const size_t four = (size_t)run * it.fours + byte / 4, at = (four * OUTPUTS + m) * 4 + byte % 4;
                        if (bits)
                            out[i * s.row + at / 8] |= (uint8_t)((weight > 0) << at % 8);
                        else
                            out[i * s.row + at] = (uint8_t)weight;
                        added[i * OUTPUTS + m] += 128 * weight;
                    }
        }
    }
}

TARGET static inline __m512 larger(__m512 most, __m512 v) { return _mm512_max_ps(_mm512_abs_ps(v), most); } /* of NaN, `most` */

TARGET static void most_of_row(const abste_job *job, uint32_t y) {
    const float *in = job->in + (size_t)y * job->W * job->C;
    const size_t count = (size_t)job->W * job->C;
    __m512 most[4];
    UNROLL for (int v = 0; v < 4; ++v) most[v] = _mm512_setzero_ps();
    size_t k = 0;
    for (; count - k >= 64; k += 64)
        UNROLL for (int v = 0; v < 4; ++v) most[v] = larger(most[v], _mm512_loadu_ps(in + k + 16 * v));
    for (; k < count; k += 16) {
        const __mmask16 some = count - k < 16 ? (__mmask16)((1u << (count - k)) - 1) : (__mmask16)0xFFFF;
        most[0] = larger(most[0], _mm512_maskz_loadu_ps(some, in + k));
    }
    job->row_most[y] = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3])));
}

/* Integers of sixteen numbers. */
TARGET static inline __m512i integers(__m512 v, __m512 times) {
    v = _mm512_mul_ps(v, times);
    const __m512 clamped = _mm512_max_ps(_mm512_min_ps(v, _mm512_set1_ps(127)), _mm512_set1_ps(-127));
    return _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), clamped);
}

TARGET static void integers_of_row(const abste_job *job, uint32_t y) {
    const float *in = job->in + (size_t)y * job->W * job->C;
    uint8_t *out = job->eight + (size_t)y * job->eight_row;
    const size_t before = (size_t)job->node->padding[1] * job->C, count = (size_t)job->W * job->C;
    const __m512 times = _mm512_set1_ps(job->eight_times);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (size_t k = 0; k < before; ++k)
        out[k] = 128;
    size_t k = 0;
    for (; count - k >= 64; k += 64) {
        __m512i q[4];
        UNROLL for (int v = 0; v < 4; ++v) q[v] = integers(_mm512_loadu_ps(in + k + 16 * v), times);
        const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
        _mm512_storeu_si512(out + before + k, _mm512_xor_si512(_mm512_permutexvar_epi32(order, bytes), _mm512_set1_epi8((char)0x80)));
    }
    for (; k < count; k += 16) {
        const __mmask16 some = count - k < 16 ? (__mmask16)((1u << (count - k)) - 1) : (__mmask16)0xFFFF;
        const __m128i bytes = _mm512_cvtepi32_epi8(integers(_mm512_maskz_loadu_ps(some, in + k), times));
        _mm_mask_storeu_epi8(out + before + k, some, _mm_xor_si128(bytes, _mm_set1_epi8((char)0x80)));
    }
    for (k = before + count; k < job->eight_row; ++k)
        out[k] = 128;
}

typedef struct {
    const uint8_t *in, *weight; /* of the first row of the kernel that lies inside, and of pixel 0 */
    const int32_t *added;
    const float *scales;
    size_t row, next_tap, step; /* bytes from row to row of the inputs, from run to run, from pixel to pixel */
    uint32_t rows, runs, fours;
    float scale;
    int binary;
} dot;

TARGET static inline __m512i from_bits(const uint8_t *bits) {
    uint64_t mask;
    __builtin_memcpy(&mask, bits, sizeof mask);
    return _mm512_mask_blend_epi8((__mmask64)mask, _mm512_set1_epi8(-1), _mm512_set1_epi8(1));
}

TARGET static inline __m512i four_of(const uint8_t *in) {
    int32_t four;
    __builtin_memcpy(&four, in, sizeof four);
    return _mm512_set1_epi32(four);
}

#define KERNEL(NAME, P, BYTES, WEIGHT)                                                                                          \
    TARGET static void NAME##_##P(const dot *at, abste_sums *sums, uint32_t first) {                                            \
        __m512i total[P][2], start[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};                                       \
        for (uint32_t i = 0; i < at->rows; ++i)                                                                                 \
            UNROLL for (int o = 0; o < 2; ++o)                                                                                  \
                start[o] = _mm512_sub_epi32(start[o], _mm512_load_si512(at->added + i * OUTPUTS + 16 * o));                     \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < 2; ++o) total[p][o] = start[o];                           \
        const uint8_t *weight = at->weight;                                                                                     \
        for (uint32_t i = 0; i < at->rows; ++i)                                                                                 \
            for (uint32_t run = 0; run < at->runs; ++run) {                                                                     \
                const uint8_t *in = at->in + i * at->row + run * at->next_tap;                                                  \
                for (uint32_t k = 0; k < at->fours; ++k, in += 4, weight += 2 * BYTES) {                                        \
                    const __m512i w0 = WEIGHT(weight), w1 = WEIGHT(weight + BYTES);                                             \
                    UNROLL for (int p = 0; p < P; ++p) {                                                                        \
                        const __m512i four = four_of(in + p * at->step);                                                        \
                        total[p][0] = _mm512_dpbusd_epi32(total[p][0], four, w0);                                               \
                        total[p][1] = _mm512_dpbusd_epi32(total[p][1], four, w1);                                               \
                    }                                                                                                           \
                }                                                                                                               \
            }                                                                                                                   \
        __m512 scale[2];                                                                                                        \
        UNROLL for (int o = 0; o < 2; ++o)                                                                                      \
            scale[o] = at->binary ? _mm512_set1_ps(at->scale)                                                                   \
                                  : _mm512_mul_ps(_mm512_set1_ps(at->scale), _mm512_load_ps(at->scales + 16 * o));              \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < 2; ++o)                                                   \
            _mm512_store_ps(sums[p].f + first + 16 * o, _mm512_mul_ps(_mm512_cvtepi32_ps(total[p][o]), scale[o]));              \
    }
#define KERNELS(P) KERNEL(bits, P, 8, from_bits) KERNEL(bytes, P, 64, _mm512_load_si512)
KERNELS(1)
KERNELS(2)
KERNELS(4)
KERNELS(7)
KERNELS(8)

typedef void (*dotter)(const dot *, abste_sums *, uint32_t);
static const dotter BITS[] = {NULL, bits_1, bits_2, NULL, bits_4, NULL, NULL, bits_7, bits_8};
static const dotter BYTES[] = {NULL, bytes_1, bytes_2, NULL, bytes_4, NULL, NULL, bytes_7, bytes_8};

/* Of those that are left: rows of 7, 14, 28... pixels go in sevens. */
static uint32_t pixels_of(uint32_t left) {
    return left % 7 == 0 ? 7 : left >= 8 ? 8 : left >= 7 ? 7 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

static void row_of(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) {
    const abste_node_record *node = job->node;
    const shape it = shape_of(node, job->C);
    const sizes s = sizes_of(node, it);
    const int bits = as_bits(node, it);
    const int64_t row = (int64_t)y * node->stride[0] - node->padding[0];
    const abste_range is = taps_inside(row, node->kernel[0], node->dilation[0], job->H);
    dot at = {.row = job->eight_row * node->dilation[0],
              .next_tap = (size_t)node->dilation[1] * job->C,
              .step = (size_t)node->stride[1] * job->C,
              .rows = is.last - is.first,
              .runs = it.runs,
              .fours = it.fours,
              .scale = job->eight_scale,
              .binary = node->op == OP_SIGN_CONV};
    _Alignas(64) abste_sums sums[MOST_PIXELS];
    for (uint32_t x = 0, pixels; x < job->w; x += pixels) {
        pixels = pixels_of(job->w - x);
        at.in = job->eight + x * at.step;
        if (at.rows)
            at.in += (size_t)(row + (int64_t)is.first * node->dilation[0]) * job->eight_row;
        for (uint32_t first = 0; first < n; first += OUTPUTS) {
            const uint8_t *packed = (const uint8_t *)job->packed + (o + first) / OUTPUTS * s.block;
            at.weight = packed + is.first * s.row;
            at.added = (const int32_t *)(const void *)(packed + s.weights) + is.first * OUTPUTS;
            at.scales = (const float *)(const void *)(packed + s.weights) + node->kernel[0] * OUTPUTS;
            (bits ? BITS : BYTES)[pixels](&at, sums, first);
        }
        job->finish(job, y, x, pixels, o, n, sums);
    }
}

const abste_int8_kernel abste_int8_avx512 = {{bytes_of, pack, row_of, 0}, most_of_row, integers_of_row, NULL};
#endif
