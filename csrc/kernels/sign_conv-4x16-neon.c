/* sign_conv for NEON: sums from tables of four inputs, four pixels by 16 output channels.
 *
 * Four inputs have sixteen sums with signs. Eight of them are the others negated, so that a table is two registers (tbl with four
 * costs thrice as much as with two on a Cortex-A76, and more than twice on others); byte indexes choose a sum for four output
 * channels, and a multiplication by 1 or -1 adds or subtracts it. Such a product is exact, so that the fused operation rounds once,
 * as the addition does. (Where a sum is zero, its negative may be -0 in place of +0; that adds alike to what is never -0 itself.)
 *
 * Instructions of the vector pipes for 16 products: tbl, fmla. With signs in bits, and no tables: four eor and four fadd. As
 * products with 1 and -1: two fmul, two fmla, two fadd. With tables of all sixteen sums: tbl, which counts as three, and fadd.
 *
 * Indexes and factors of 16 output channels are unpacked from four bits for a row of pixels at a time.
 */
#include "neon.h"

#ifdef ABSTE_ARM

#define MOST_COLUMNS 72u /* input pixels that there are tables for at a time: 256 bytes each */
#define MOST_SUMS 64u    /* blocks of 64 sums that are added to at a time: 256 bytes each */
#define MOST_OUTPUTS 32u /* output pixels at a time */
#define GROUPS 8u        /* of four, in a block of 32 channels */

typedef struct {
    float sums[GROUPS][8]; /* number m adds those of three channels whose bit in m is set, subtracts the others, adds the fourth */
} tables;

/* What chooses from a table, for 16 output channels: where the bytes of the sums lie, and 1 or -1. */
typedef struct {
    uint8x16_t bytes[4];
    float32x4_t factors[4];
} choice;

/* How far the taps of a row reach. */
static uint32_t reach_of(const abste_node_record *node) { return (node->kernel[1] - 1u) * node->dilation[1]; }

size_t abste_sign_conv_bytes_neon(const abste_model *model, const abste_node_record *node) {
    if (node->groups != 1 || node->kernel[1] > 64 || reach_of(node) >= MOST_COLUMNS)
        return 0;
    const uint64_t taps = (uint64_t)node->kernel[0] * node->kernel[1];
    const uint64_t blocks = (written_by(model, node)->c + 15) / 16;
    return (size_t)(blocks * 16 * taps * words_of(value_at(model, node->in0)->c) * sizeof(uint32_t));
}

/* For 16 output channels together: rows, blocks of 32 input channels, taps; for each tap a word per output channel, four bits for each
 * group: three of the number in the table, and whether it is added. Channels that are missing count as +0, so their bits are set. */
void abste_sign_conv_pack_neon(const abste_model *model, const abste_node_record *node, void *memory) {
    const uint32_t C = value_at(model, node->in0)->c, c = written_by(model, node)->c;
    const uint32_t kh = node->kernel[0], kw = node->kernel[1];
    const uint32_t *weight = blob_data(model, node->weight);
    uint32_t *out = memory;
    for (uint32_t o = 0; o < c; o += 16)
        for (uint32_t i = 0; i < kh; ++i)
            for (uint32_t k = 0; k < C; k += 32)
                for (uint32_t j = 0; j < kw; ++j)
                    for (uint32_t m = 0; m < 16; ++m) {
                        const uint32_t count = C - k < 32 ? C - k : 32;
                        const uint64_t at = (((uint64_t)(o + m) * kh + i) * kw + j) * C + k;
                        const uint32_t missing = count < 32 ? 0xFFFFFFFFu << count : 0;
                        const uint32_t bits = o + m < c ? bits_at(weight, at, count) | missing : 0;
                        const uint32_t subtracted = (~bits & 0x88888888u) >> 3; /* a 1 in each group whose fourth bit is clear */
                        *out++ = bits ^ subtracted * 7;
                    }
}

static void choose(const uint32_t *packed, uint32_t groups, choice *out) {
    const uint32x4_t first = vdupq_n_u32(0x03020100), one = vreinterpretq_u32_f32(vdupq_n_f32(1.0f));
    for (int o = 0; o < 4; ++o) {
        uint32x4_t word = vld1q_u32(packed + 4 * o);
        for (uint32_t g = 0; g < groups; ++g, word = vshrq_n_u32(word, 4)) {
            const uint32x4_t number = vandq_u32(word, vdupq_n_u32(7));
            out[g].bytes[o] = vreinterpretq_u8_u32(vmlaq_u32(first, number, vdupq_n_u32(0x04040404)));
            const uint32x4_t minus = vbicq_u32(vdupq_n_u32(0x80000000), vshlq_n_u32(word, 28));
            out[g].factors[o] = vreinterpretq_f32_u32(vorrq_u32(minus, one));
        }
    }
}

/* The tables of `count` channels of a pixel. */
static void tabulate(const float *in, uint32_t count, tables *out) {
    static const float signs[2][4] = {{-1, 1, -1, 1}, {-1, -1, 1, 1}};
    const float32x4_t s0 = vld1q_f32(signs[0]), s1 = vld1q_f32(signs[1]);
    for (uint32_t k = 0; k < count; k += 4) {
        float four[4] = {0};
        for (uint32_t b = 0; b < 4 && k + b < count; ++b)
            four[b] = in[k + b];
        const float32x4_t low = vaddq_f32(vmulq_n_f32(s0, four[0]), vmulq_n_f32(s1, four[1]));
        vst1q_f32(out->sums[k / 4], vaddq_f32(low, vdupq_n_f32(four[3] - four[2])));
        vst1q_f32(out->sums[k / 4] + 4, vaddq_f32(low, vdupq_n_f32(four[3] + four[2])));
    }
}

/* Else compilers begin with all pixels at once, and have no registers left. */
#define IN_ORDER(v) __asm__ volatile("" : "+w"((v)[0]), "+w"((v)[1]), "+w"((v)[2]), "+w"((v)[3]) : : "memory")

/* Adds the groups of a block, for one tap, to the sums of P pixels and 16 channels. `in` are the tables under the tap at pixel 0;
 * `step` further are those of the next pixel. */
#define KERNEL(P)                                                                                                               \
    static void add_##P(const tables *in, size_t step, const choice *choices, uint32_t groups, abste_sums *sums, uint32_t o) {  \
        float32x4_t total[P][4];                                                                                                \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int q = 0; q < 4; ++q) total[p][q] = vld1q_f32(sums[p].f + o + 4 * q);   \
        for (uint32_t g = 0; g < groups; ++g) {                                                                                 \
            uint8x16_t bytes[4];                                                                                                \
            float32x4_t factors[4];                                                                                             \
            UNROLL for (int q = 0; q < 4; ++q) bytes[q] = choices[g].bytes[q], factors[q] = choices[g].factors[q];              \
            UNROLL for (int p = 0; p < P; ++p) {                                                                                \
                const uint8x16x2_t table = vld1q_u8_x2((const uint8_t *)in[p * step].sums[g]);                                  \
                UNROLL for (int q = 0; q < 4; ++q)                                                                              \
                    total[p][q] = vfmaq_f32(total[p][q], vreinterpretq_f32_u8(vqtbl2q_u8(table, bytes[q])), factors[q]);        \
                IN_ORDER(total[p]);                                                                                             \
            }                                                                                                                   \
        }                                                                                                                       \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int q = 0; q < 4; ++q) vst1q_f32(sums[p].f + o + 4 * q, total[p][q]);    \
    }

KERNEL(1)
KERNEL(2)
KERNEL(4)

void abste_sign_conv_neon(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) {
    const abste_node_record *node = job->node;
    const uint32_t kh = node->kernel[0], kw = node->kernel[1], words = words_of(job->C), stride = node->stride[1];
    const uint32_t dilation = node->dilation[1], reach = reach_of(node), blocks = (o + n + BLOCK - 1) / BLOCK;
    const int64_t row = (int64_t)y * node->stride[0] - node->padding[0];
    const abste_range is = taps_inside(row, kh, node->dilation[0], job->H);
    _Alignas(64) tables in[MOST_COLUMNS];
    _Alignas(64) abste_sums sums[MOST_SUMS];
    choice choices[GROUPS];
    uint32_t width = (MOST_COLUMNS - 1 - reach) / stride + 1; /* output pixels at a time */
    width = width < MOST_OUTPUTS ? width : MOST_OUTPUTS;
    width = width < job->w ? width : job->w;
    for (uint32_t first = o / BLOCK; first < blocks;) {
        uint32_t some = MOST_SUMS / width;
        some = some < blocks - first ? some : blocks - first;
        const uint32_t end = job->c - first * BLOCK < some * BLOCK ? job->c - first * BLOCK : some * BLOCK;
        for (uint32_t x = 0; x < job->w;) {
            const uint32_t pixels = job->w - x < width ? job->w - x : width;
            const int64_t column = (int64_t)x * stride - node->padding[1];
            for (uint32_t k = 0; k < some * pixels; ++k)
                for (uint32_t m = 0; m < BLOCK; ++m)
                    sums[k].f[m] = 0;
            for (uint32_t i = is.first; i < is.last; ++i) {
                const float *line = job->in + (size_t)(row + (int64_t)i * node->dilation[0]) * job->W * job->C;
                for (uint32_t word = 0; word < words; ++word) {
                    const uint32_t left = job->C - 32 * word, count = left < 32 ? left : 32, groups = (count + 3) / 4;
                    for (uint32_t s = 0; s <= (pixels - 1) * stride + reach; ++s)
                        if (column + s >= 0 && column + s < (int64_t)job->W)
                            tabulate(line + (size_t)(column + s) * job->C + 32 * word, count, &in[s]);
                    for (uint32_t m = 0; m < end; m += 16) {
                        const uint32_t *weight = (const uint32_t *)job->packed +
                                                 ((((size_t)first * (BLOCK / 16) + m / 16) * kh + i) * words + word) * kw * 16;
                        for (uint32_t j = 0; j < kw; ++j) {
                            /* The pixels that have this tap inside, as taps of a kernel over pixels. */
                            const abste_range ps = taps_inside(column + (int64_t)j * dilation, pixels, stride, job->W);
                            if (ps.first == ps.last)
                                continue;
                            choose(weight + 16 * (size_t)j, groups, choices);
                            const tables *under = &in[ps.first * stride + j * dilation];
                            abste_sums *to = &sums[m / BLOCK * pixels + ps.first];
                            uint32_t alike = ps.last - ps.first;
                            for (; alike >= 4; alike -= 4, under += 4 * stride, to += 4)
                                add_4(under, stride, choices, groups, to, m % BLOCK);
                            for (; alike >= 2; alike -= 2, under += 2 * stride, to += 2)
                                add_2(under, stride, choices, groups, to, m % BLOCK);
                            if (alike)
                                add_1(under, stride, choices, groups, to, m % BLOCK);
                        }
                    }
                }
            }
            for (uint32_t b = 0; b < some; ++b) {
                const uint32_t at = (first + b) * BLOCK;
                job->finish(job, y, x, pixels, at, job->c - at < BLOCK ? job->c - at : BLOCK, &sums[b * pixels]);
            }
            x += pixels;
        }
        first += some;
    }
}
#endif
