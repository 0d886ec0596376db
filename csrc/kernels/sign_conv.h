/* sign_conv by tables: what kernels share that add, for 64 output channels, sums chosen from tables of four inputs.
 *
 * Four inputs have sixteen sums with signs; four bits of the weight choose one. That is a quarter of the additions, in the order of
 * docs/format.md. The tables of a block of 32 channels serve every tap of the kernel's row and all output channels before the next
 * block is looked at. The file that includes this has defined TABLE, the sums in a table: 16, or 8 where the others are made by
 * turning signs.
 */
#ifndef ABSTE_SIGN_CONV_H
#define ABSTE_SIGN_CONV_H

#include "../src/internal.h"

#define MOST_COLUMNS 72u /* input pixels that there are tables for at a time */
#define MOST_SUMS 256u   /* blocks of 64 sums that are added to at a time: 256 bytes each */
#define MOST_OUTPUTS 32u /* output pixels at a time */

typedef struct {
    _Alignas(64) float sums[8][TABLE]; /* of four channels each; number m adds those whose bit in m is set, subtracts the others */
} tables;

/* How far the taps of a row reach. */
static inline uint32_t reach_of(const abste_node_record *node) { return (node->kernel[1] - 1u) * node->dilation[1]; }

static inline size_t sign_conv_bytes(const abste_model *model, const abste_node_record *node) {
    if (node->groups != 1 || node->kernel[1] > 64 || reach_of(node) >= MOST_COLUMNS)
        return 0;
    const uint64_t taps = (uint64_t)node->kernel[0] * node->kernel[1];
    const uint64_t blocks = (written_by(model, node)->c + BLOCK - 1) / BLOCK;
    return (size_t)(blocks * BLOCK * taps * words_of(value_at(model, node->in0)->c) * sizeof(uint32_t));
}

/* Rows, blocks of 32 input channels, blocks of 64 output channels, taps: as they are read. Channels that are missing count as
 * +0, so their bits are set.
 * A table of 8 has the sums that add the fourth input; where it is subtracted, the others' bits choose the opposite, to be turned. */
static inline void sign_conv_pack(const abste_model *model, const abste_node_record *node, void *memory) {
    const uint32_t C = value_at(model, node->in0)->c, c = written_by(model, node)->c;
    const uint32_t kh = node->kernel[0], kw = node->kernel[1];
    const uint32_t *weight = blob_data(model, node->weight);
    uint32_t *out = memory;
    for (uint32_t i = 0; i < kh; ++i)
        for (uint32_t k = 0; k < C; k += 32)
            for (uint32_t o = 0; o < c; o += BLOCK)
                for (uint32_t j = 0; j < kw; ++j)
                    for (uint32_t m = 0; m < BLOCK; ++m) {
                        const uint32_t count = C - k < 32 ? C - k : 32;
                        const uint64_t at = (((uint64_t)(o + m) * kh + i) * kw + j) * C + k;
                        const uint32_t missing = count < 32 ? 0xFFFFFFFFu << count : 0;
                        const uint32_t bits = o + m < c ? bits_at(weight, at, count) | missing : 0;
                        *out++ = TABLE == 16 ? bits : bits ^ ((~bits & 0x88888888u) >> 3) * 7;
                    }
}

/* The tables of `count` channels of some pixels, `step` floats apart. */
typedef void (*tabulator)(const float *in, size_t step, uint32_t pixels, uint32_t count, tables *out);

/* Adds the groups of a block, tap by tap, to the sums of some pixels and 64 channels. `in` are the tables under tap 0 of
 * pixel 0; `step` further are those of the next pixel, `dilation` further those of the next tap. */
typedef struct {
    const tables *in;
    size_t step, dilation;
    const uint32_t *weight;
    uint32_t taps, groups, pixels, channels; /* of the 64, those that there are: nobody looks at the sums of others */
    abste_sums *sums;
} addition;
typedef void (*row_adder)(const addition *what);

/* By kernels for a number of pixels and at least n channels: adders[p] is for p pixels, `most` at the most. */
typedef void (*adder)(const tables *in, size_t step, size_t dilation, const uint32_t *weight, uint32_t taps, uint32_t groups,
                      uint32_t n, abste_sums *sums);
static inline void add_by(const adder *adders, uint32_t most, const addition *what) {
    for (uint32_t p = 0; p < what->pixels;) {
        const uint32_t together = what->pixels - p < most ? what->pixels - p : most;
        adders[together](what->in + p * what->step, what->step, what->dilation, what->weight, what->taps, what->groups,
                         what->channels, what->sums + p);
        p += together;
    }
}

/* How many channels a block of them has. */
static inline uint32_t channels_of(const abste_job *job, uint32_t block) {
    return job->c - block * BLOCK < BLOCK ? job->c - block * BLOCK : BLOCK;
}

/* The tap row through which output row y reads input row r, or the number of them where there is none. */
static inline uint32_t tap_row(const abste_node_record *node, uint32_t y, uint32_t r) {
    const int64_t down = (int64_t)r - ((int64_t)y * node->stride[0] - node->padding[0]);
    const uint32_t kh = node->kernel[0], dilation = node->dilation[0];
    return down >= 0 && down % dilation == 0 && down / dilation < kh ? (uint32_t)(down / dilation) : kh;
}

/* Some rows of pixels. Input rows come from above, and so each output row meets its taps in their order. Taps outside add zeros, which
 * change no sum: none is -0. */
static inline void sign_conv_row(const abste_job *job, uint32_t y, uint32_t o, uint32_t n, tabulator tabulate, row_adder add) {
    const abste_node_record *node = job->node;
    const uint32_t kh = node->kernel[0], kw = node->kernel[1], words = words_of(job->C), stride = node->stride[1];
    const uint32_t dilation = node->dilation[1], reach = reach_of(node);
    const uint32_t all = (job->c + BLOCK - 1) / BLOCK, blocks = (o + n + BLOCK - 1) / BLOCK;
    const uint32_t rows = job->h - y < job->rows ? job->h - y : job->rows;
    const int64_t top = (int64_t)y * node->stride[0] - node->padding[0];
    const int64_t bottom = (int64_t)(rows - 1) * node->stride[0] + top + (int64_t)(kh - 1) * node->dilation[0];
    const uint32_t begin = top > 0 ? (uint32_t)top : 0, end = bottom < 0 ? 0 : bottom < (int64_t)job->H ? (uint32_t)bottom + 1 : job->H;
    _Alignas(64) tables in[MOST_COLUMNS];
    _Alignas(64) abste_sums sums[MOST_SUMS];
    uint32_t width = (MOST_COLUMNS - 1 - reach) / stride + 1; /* output pixels at a time */
    width = width < MOST_OUTPUTS ? width : MOST_OUTPUTS;
    const uint32_t times = (job->w + width - 1) / width;
    width = (job->w + times - 1) / times;
    for (uint32_t first = o / BLOCK; first < blocks;) {
        uint32_t some = MOST_SUMS / (rows * width); /* at least one */
        some = some < blocks - first ? some : blocks - first;
        for (uint32_t x = 0; x < job->w;) {
            const uint32_t pixels = job->w - x < width ? job->w - x : width;
            const int64_t column = (int64_t)x * stride - node->padding[1];
            for (uint32_t k = 0; k < some * rows * pixels; ++k)
                for (uint32_t m = 0; m < BLOCK; ++m)
                    sums[k].f[m] = 0;
            const uint32_t columns = (pixels - 1) * stride + reach + 1;
            const abste_range inside = taps_inside(column, columns, 1, job->W);
            for (uint32_t s = 0; s < columns; ++s)
                if (s < inside.first || s >= inside.last)
                    for (uint32_t m = 0; m < 8 * TABLE; ++m)
                        in[s].sums[m / TABLE][m % TABLE] = 0;
            for (uint32_t r = begin; r < end; ++r) {
                const float *line = job->in + (size_t)r * job->W * job->C;
                uint32_t taps[ROWS_AT_ONCE], readers = 0;
                for (uint32_t k = 0; k < rows; ++k)
                    readers += (taps[k] = tap_row(node, y + k, r)) < kh;
                for (uint32_t word = 0; word < words && readers; ++word) {
                    const uint32_t left = job->C - 32 * word, count = left < 32 ? left : 32;
                    if (inside.first < inside.last)
                        tabulate(line + (size_t)(column + inside.first) * job->C + 32 * word, job->C,
                                 inside.last - inside.first, count, &in[inside.first]);
                    for (uint32_t b = 0; b < some; ++b)
                        for (uint32_t k = 0; k < rows; ++k) {
                            if (taps[k] == kh)
                                continue;
                            const size_t block = ((size_t)taps[k] * words + word) * all + first + b;
                            const addition what = {.in = in, .step = stride, .dilation = dilation, .taps = kw,
                                                   .groups = (count + 3) / 4,
                                                   .weight = (const uint32_t *)job->packed + block * kw * BLOCK,
                                                   .pixels = pixels, .channels = channels_of(job, first + b),
                                                   .sums = &sums[(b * rows + k) * pixels]};
                            add(&what);
                        }
                }
            }
            for (uint32_t b = 0; b < some; ++b)
                for (uint32_t k = 0; k < rows; ++k) {
                    const uint32_t at = (first + b) * BLOCK;
                    job->finish(job, y + k, x, pixels, at, channels_of(job, first + b), &sums[(b * rows + k) * pixels]);
                }
            x += pixels;
        }
        first += some;
    }
}

#endif
