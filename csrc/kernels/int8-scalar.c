/* Convolutions with inputs of eight bits: which nodes they serve, how inputs and weights become integers, and the scalar kernels.
 *
 * The inputs of a node share one scale, that of the image's largest: q = x * (127 / most) rounded to nearest even, within
 * [-127, 127]; 0 where that is NaN. Float weights have a scale per output channel. A sum is an i32, exact in any order, and
 * becomes a float once: sum * (most / 127), or sum * ((most / 127) * scale of the channel).
 */
#include "../src/internal.h"

#include <string.h>

#define MOST_TERMS (1u << 17) /* 127 * 127 * this fits an i32 */
#define MOST_REACH 64u        /* of padding and taps: integers take little more memory than inputs */

int abste_int8(const abste_model *model, uint32_t which, const abste_node_record *node) {
    const abste_value_record *in = value_at(model, node->in0);
    const uint32_t kind = node->op == OP_SIGN_CONV            ? ABSTE_INT8_BINARY
                          : node->op != OP_CONV               ? 0
                          : node->in0 < model->input_count    ? ABSTE_INT8_STEM
                                                              : ABSTE_INT8_FLOAT;
    const uint64_t terms = (uint64_t)node->kernel[0] * node->kernel[1] * in->c;
    return (kind & which) && node->groups == 1 && terms <= MOST_TERMS &&
           (uint64_t)(node->kernel[1] - 1u) * node->dilation[1] < MOST_REACH && node->padding[1] < MOST_REACH &&
           node->padding[3] < MOST_REACH && abste_int8_scratch(model, node) <= 0x7FFFFFFFu;
}

/* Rows of integers with the padding left and right of them, then the largest number of each row. */
uint64_t abste_int8_scratch(const abste_model *model, const abste_node_record *node) {
    const abste_value_record *in = value_at(model, node->in0);
    const uint64_t row = ((uint64_t)node->padding[1] + in->w + node->padding[3]) * in->c;
    return abste_int8_rows_bytes(row * in->h) + ((uint64_t)in->h * sizeof(float) + 63) / 64 * 64;
}

float abste_weight(const abste_job *job, size_t at) {
    return job->half ? abste_from_half(((const uint16_t *)job->weight)[at]) : ((const float *)job->weight)[at];
}

static int32_t pattern_of(float number) {
    int32_t pattern;
    memcpy(&pattern, &number, sizeof pattern);
    return pattern & 0x7FFFFFFF; /* as integers in the order of the sizes */
}

/* The scale of the weights of an output channel, and what they are multiplied with. */
float abste_int8_scale(const abste_job *job, uint32_t o, float *times) {
    const size_t terms = (size_t)job->node->kernel[0] * job->node->kernel[1] * job->C;
    float most = 0;
    for (size_t k = 0; k < terms; ++k) {
        const float weight = abste_weight(job, k * job->c + o), size = weight < 0 ? -weight : weight;
        most = size > most ? size : most;
    }
    *times = 127.0f / most;
    return most / 127.0f;
}

/* To nearest even: adding the constant leaves no bits behind the point. */
int8_t abste_int8_of(float number, float times) {
    float v = number * times;
    if (v != v)
        return 0;
    v = v < -127.0f ? -127.0f : v > 127.0f ? 127.0f : v;
    return (int8_t)(int32_t)((v + 12582912.0f) - 12582912.0f);
}

static void most_of_row(const abste_job *job, uint32_t y) {
    const float *in = job->in + (size_t)y * job->W * job->C;
    int32_t most = 0;
    for (size_t k = 0; k < (size_t)job->W * job->C; ++k) {
        const int32_t pattern = pattern_of(in[k]);
        most = pattern > most && pattern <= 0x7F800000 ? pattern : most; /* NaN has no size */
    }
    memcpy(&job->row_most[y], &most, sizeof most);
}

static void integers_of_row(const abste_job *job, uint32_t y) {
    const abste_node_record *node = job->node;
    const float *in = job->in + (size_t)y * job->W * job->C;
    int8_t *out = (int8_t *)job->eight + (size_t)y * job->eight_row;
    const size_t left = (size_t)node->padding[1] * job->C, middle = (size_t)job->W * job->C;
    for (size_t k = 0; k < left; ++k)
        out[k] = 0;
    for (size_t k = 0; k < middle; ++k)
        out[left + k] = abste_int8_of(in[k], job->eight_times);
    for (size_t k = left + middle; k < job->eight_row; ++k)
        out[k] = 0;
}

/* Float weights as integers in the order that they have as floats, then the scales. Bits stay where they are. */
static size_t weights_of(const abste_model *model, const abste_node_record *node) {
    return ((size_t)blob_at(model, node->weight)->count + 63) / 64 * 64;
}

static size_t bytes_of(const abste_model *model, const abste_node_record *node) {
    return node->op == OP_SIGN_CONV ? 0 : weights_of(model, node) + written_by(model, node)->c * sizeof(float);
}

static void pack(const abste_model *model, const abste_node_record *node, void *memory) {
    const abste_job job = abste_job_of(model, node);
    int8_t *out = memory;
    float *scales = (float *)(void *)((uint8_t *)memory + weights_of(model, node));
    const size_t terms = (size_t)node->kernel[0] * node->kernel[1] * job.C;
    for (uint32_t o = 0; o < job.c; ++o) {
        float times;
        scales[o] = abste_int8_scale(&job, o, &times);
        for (size_t k = 0; k < terms; ++k)
            out[k * job.c + o] = abste_int8_of(abste_weight(&job, k * job.c + o), times);
    }
}

static void sums_of_pixel(const abste_job *job, uint32_t y, uint32_t x, uint32_t o, uint32_t n, abste_sums *sums) {
    const abste_node_record *node = job->node;
    const int64_t row = (int64_t)y * node->stride[0] - node->padding[0];
    const abste_range is = taps_inside(row, node->kernel[0], node->dilation[0], job->H);
    int32_t total[BLOCK];
    for (uint32_t m = 0; m < n; ++m)
        total[m] = 0;
    for (uint32_t i = is.first; i < is.last; ++i)
        for (uint32_t j = 0; j < node->kernel[1]; ++j) { /* the padding left and right is there, and zero */
            const size_t tap = (size_t)i * node->kernel[1] + j, s = (size_t)x * node->stride[1] + (size_t)j * node->dilation[1];
            const int8_t *in = (const int8_t *)job->eight + (size_t)(row + (int64_t)i * node->dilation[0]) * job->eight_row + s * job->C;
            if (node->op == OP_CONV) {
                const int8_t *weight = (const int8_t *)job->packed + tap * job->C * job->c + o;
                for (uint32_t k = 0; k < job->C; ++k, weight += job->c)
                    for (uint32_t m = 0; m < n; ++m)
                        total[m] += in[k] * weight[m];
                continue;
            }
            const uint64_t terms = (uint64_t)node->kernel[0] * node->kernel[1] * job->C;
            for (uint32_t k = 0; k < job->C; k += 32) {
                const uint32_t count = job->C - k < 32 ? job->C - k : 32;
                for (uint32_t m = 0; m < n; ++m) {
                    const uint32_t bits = bits_at(job->weight, (o + m) * terms + tap * job->C + k, count);
                    for (uint32_t b = 0; b < count; ++b)
                        total[m] += bits >> b & 1 ? in[k + b] : -in[k + b];
                }
            }
        }
    const uint8_t *packed = job->packed;
    const float *scales = node->op == OP_CONV ? (const float *)(const void *)(packed + weights_of(job->model, node)) + o : NULL;
    for (uint32_t m = 0; m < n; ++m)
        sums->f[m] = (float)total[m] * (scales ? job->eight_scale * scales[m] : job->eight_scale);
}

const abste_int8_kernel abste_int8_scalar = {{bytes_of, pack, NULL, 0}, most_of_row, integers_of_row, sums_of_pixel};
