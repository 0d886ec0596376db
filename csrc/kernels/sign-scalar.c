/* Convolutions with one-bit weights: of floats (sign_conv) and of bits (xnor). */
#include "../src/internal.h"

#include <string.h>

static inline uint32_t popcount(uint32_t word) {
#if defined(__POPCNT__) || defined(__aarch64__)
    return (uint32_t)__builtin_popcount(word);
#else
    word -= word >> 1 & 0x55555555u;
    word = (word & 0x33333333u) + (word >> 2 & 0x33333333u);
    return ((word + (word >> 4)) & 0x0F0F0F0Fu) * 0x01010101u >> 24;
#endif
}

#define LANES 8u /* output channels at a time: a sum waits for itself, eight of them do not */

void abste_sign_conv_scalar(const abste_job *job, uint32_t y, uint32_t x, uint32_t o, uint32_t n, abste_sums *sums) {
    const abste_node_record *node = job->node;
    const uint32_t per_group = job->C / node->groups, outputs = job->c / node->groups;
    const uint64_t taps = (uint64_t)node->kernel[0] * node->kernel[1] * per_group;
    const int64_t row = (int64_t)y * node->stride[0] - node->padding[0];
    const int64_t column = (int64_t)x * node->stride[1] - node->padding[1];
    const abste_range is = taps_inside(row, node->kernel[0], node->dilation[0], job->H);
    const abste_range js = taps_inside(column, node->kernel[1], node->dilation[1], job->W);
    for (uint32_t first = 0; first < n;) {
        const uint32_t group = (o + first) / outputs;
        uint32_t lanes = (group + 1) * outputs - (o + first); /* those of one group read the same inputs */
        lanes = lanes < n - first ? lanes : n - first;
        lanes = lanes < LANES ? lanes : LANES;
        float f[LANES] = {0};
        for (uint32_t i = is.first; i < is.last; ++i)
            for (uint32_t k = 0; k < per_group; k += 32)
                for (uint32_t j = js.first; j < js.last; ++j) {
                    const size_t r = (size_t)(row + (int64_t)i * node->dilation[0]);
                    const size_t s = (size_t)(column + (int64_t)j * node->dilation[1]);
                    const float *in = job->in + (r * job->W + s) * job->C + (size_t)group * per_group + k;
                    const uint32_t count = per_group - k < 32 ? per_group - k : 32;
                    uint32_t minus[LANES] = {0}; /* the bits of weights that are -1, first channel first */
                    for (uint32_t m = 0; m < lanes; ++m) {
                        const uint64_t at =
                            (o + first + m) * taps + ((uint64_t)i * node->kernel[1] + j) * per_group + k;
                        minus[m] = ~bits_at(job->weight, at, count);
                    }
                    for (uint32_t b = 0; b < count; b += 4) {
                        uint32_t patterns[4] = {0}; /* missing ones are +0, whatever the bits say */
                        const uint32_t some = count - b < 4 ? count - b : 4, known = (1u << some) - 1;
                        memcpy(patterns, in + b, some * sizeof *patterns);
                        for (uint32_t m = 0; m < LANES; ++m) {
                            const uint32_t bits = minus[m] & known;
                            const uint32_t signed_patterns[4] = {patterns[0] ^ bits << 31, patterns[1] ^ (bits & 2) << 30,
                                                                 patterns[2] ^ (bits & 4) << 29, patterns[3] ^ (bits & 8) << 28};
                            float four[4];
                            memcpy(four, signed_patterns, sizeof four);
                            f[m] += (four[0] + four[1]) + (four[2] + four[3]);
                            minus[m] >>= 4;
                        }
                    }
                }
        for (uint32_t m = 0; m < lanes; ++m)
            sums->f[first + m] = f[m];
        first += lanes;
    }
}

void abste_xnor_scalar(const abste_job *job, uint32_t y, uint32_t x, uint32_t o, uint32_t n, abste_sums *sums) {
    const abste_node_record *node = job->node;
    const uint32_t per_group = job->C / node->groups, outputs = job->c / node->groups;
    const uint64_t taps = (uint64_t)node->kernel[0] * node->kernel[1] * per_group;
    const int64_t row = (int64_t)y * node->stride[0] - node->padding[0];
    const int64_t column = (int64_t)x * node->stride[1] - node->padding[1];
    const abste_range is = taps_inside(row, node->kernel[0], node->dilation[0], job->H);
    const abste_range js = taps_inside(column, node->kernel[1], node->dilation[1], job->W);
    for (uint32_t m = 0; m < n; ++m)
        sums->i[m] = 0;
    for (uint32_t i = 0; i < node->kernel[0]; ++i)
        for (uint32_t j = 0; j < node->kernel[1]; ++j) {
            const int inside = i >= is.first && i < is.last && j >= js.first && j < js.last;
            if (!inside && !node->pad_value)
                continue;
            const uint32_t outside = node->pad_value > 0 ? 0xFFFFFFFFu : 0;
            const size_t r = (size_t)(row + (int64_t)i * node->dilation[0]);
            const size_t s = (size_t)(column + (int64_t)j * node->dilation[1]);
            const uint32_t *in = inside ? job->bits + (r * job->W + s) * job->words : job->bits;
            for (uint32_t k = 0; k < per_group; k += 32) {
                const uint32_t count = per_group - k < 32 ? per_group - k : 32;
                const uint32_t mask = count == 32 ? 0xFFFFFFFFu : (1u << count) - 1;
                for (uint32_t m = 0; m < n; ++m) {
                    const uint64_t at = (o + m) * taps + ((uint64_t)i * node->kernel[1] + j) * per_group + k;
                    const uint32_t weight = bits_at(job->weight, at, count);
                    const uint32_t bits =
                        inside ? bits_at(in, (uint64_t)((o + m) / outputs) * per_group + k, count) : outside & mask;
                    sums->i[m] += (int32_t)count - 2 * (int32_t)popcount(weight ^ bits);
                }
            }
        }
}
