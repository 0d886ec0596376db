/* Convolution with float weights. Output channels lie next to each other in the weight, so that the compiler can compute several at
 * once without changing the order of any sum. */
#include "../src/internal.h"

#include <string.h>

float abste_from_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    uint32_t pattern;
    float number;
    if (exponent == 0) { /* zero and subnormals: exact in f32 */
        number = (float)fraction * 5.9604644775390625e-8f;
        memcpy(&pattern, &number, sizeof pattern);
        pattern |= sign;
    } else {
        pattern = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
    }
    memcpy(&number, &pattern, sizeof number);
    return number;
}

void abste_conv_scalar(const abste_job *job, uint32_t y, uint32_t x, uint32_t o, uint32_t n, abste_sums *sums) {
    const abste_node_record *node = job->node;
    const uint32_t groups = node->groups, per_group = job->C / groups, outputs = job->c / groups;
    const int64_t row = (int64_t)y * node->stride[0] - node->padding[0];
    const int64_t column = (int64_t)x * node->stride[1] - node->padding[1];
    const abste_range is = taps_inside(row, node->kernel[0], node->dilation[0], job->H);
    const abste_range js = taps_inside(column, node->kernel[1], node->dilation[1], job->W);
    float *f = sums->f;
    for (uint32_t k = 0; k < n; ++k)
        f[k] = 0;
    for (uint32_t i = is.first; i < is.last; ++i)
        for (uint32_t j = js.first; j < js.last; ++j) {
            const size_t r = (size_t)(row + (int64_t)i * node->dilation[0]);
            const size_t s = (size_t)(column + (int64_t)j * node->dilation[1]);
            const float *in = job->in + (r * job->W + s) * job->C;
            for (uint32_t k = 0; k < per_group; ++k) {
                const size_t at = (((size_t)i * node->kernel[1] + j) * per_group + k) * job->c + o;
                for (uint32_t first = 0; first < n;) { /* the outputs of a group read the same number */
                    const uint32_t group = (o + first) / outputs, left = (group + 1) * outputs - (o + first);
                    const uint32_t end = first + (left < n - first ? left : n - first);
                    const float number = in[group * per_group + k];
                    if (job->half)
                        for (uint32_t m = first; m < end; ++m)
                            f[m] += number * abste_from_half(((const uint16_t *)job->weight)[at + m]);
                    else
                        for (uint32_t m = first; m < end; ++m)
                            f[m] += number * ((const float *)job->weight)[at + m];
                    first = end;
                }
            }
        }
}
