/* sign_conv for NEON: four pixels by 16 channels, of 64 one after the other.
 *
 * A table is two registers: eight sums, those that add the fourth input. (tbl with two registers costs a Cortex-A76 as much as with one,
 * with the four that sixteen sums would fill thrice as much.) Byte indexes choose a sum for four output channels, and a multiplication by
 * 1 or -1 adds or subtracts it. Such a product is exact, so that the fused operation rounds once, as the addition does. Where a sum is
 * zero, its opposite may be -0 in place of +0: that counts alike for a sum that starts at +0.
 *
 * Instructions of the vector pipes for 16 products: tbl, fmla. With signs in bits, and no tables: four eor and four fadd. As
 * products with 1 and -1: two fmul, two fmla, two fadd. With tables of all sixteen sums: tbl, which counts as three, and fadd.
 *
 * Indexes and factors of 16 output channels are unpacked from four bits for a row of pixels at a time.
 */
#include "neon.h"

#ifdef ABSTE_ARM
#define TABLE 8
#include "sign_conv.h"

/* What chooses from the tables of a group, for 16 output channels: where the bytes of the sums lie, and 1 or -1. */
typedef struct {
    uint8x16_t bytes[4];
    float32x4_t factors[4];
} choice;

static void choose(const uint32_t *weight, uint32_t groups, choice *out) {
    const uint32x4_t first = vdupq_n_u32(0x03020100), one = vreinterpretq_u32_f32(vdupq_n_f32(1.0f));
    for (int o = 0; o < 4; ++o) {
        uint32x4_t word = vld1q_u32(weight + 4 * o);
        for (uint32_t g = 0; g < groups; ++g, word = vshrq_n_u32(word, 4)) {
            const uint32x4_t number = vandq_u32(word, vdupq_n_u32(7));
            out[g].bytes[o] = vreinterpretq_u8_u32(vmlaq_u32(first, number, vdupq_n_u32(0x04040404)));
            const uint32x4_t minus = vbicq_u32(vdupq_n_u32(0x80000000), vshlq_n_u32(word, 28));
            out[g].factors[o] = vreinterpretq_f32_u32(vorrq_u32(minus, one));
        }
    }
}

static void tabulate(const float *in, size_t step, uint32_t pixels, uint32_t count, tables *out) {
    static const float signs[2][4] = {{-1, 1, -1, 1}, {-1, -1, 1, 1}};
    const float32x4_t s0 = vld1q_f32(signs[0]), s1 = vld1q_f32(signs[1]);
    for (; pixels; --pixels, in += step, ++out)
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

static void add(const addition *what) {
    choice choices[8];
    for (uint32_t o = 0; o < what->channels; o += 16)
        for (uint32_t j = 0; j < what->taps; ++j) {
            choose(what->weight + (size_t)j * BLOCK + o, what->groups, choices);
            const tables *in = what->in + j * what->dilation;
            uint32_t p = 0;
            for (; what->pixels - p >= 4; p += 4)
                add_4(in + p * what->step, what->step, choices, what->groups, what->sums + p, o);
            for (; what->pixels - p >= 2; p += 2)
                add_2(in + p * what->step, what->step, choices, what->groups, what->sums + p, o);
            if (p < what->pixels)
                add_1(in + p * what->step, what->step, choices, what->groups, what->sums + p, o);
        }
}

static void row_of(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) { sign_conv_row(job, y, o, n, tabulate, add); }

const abste_packed_kernel abste_sign_conv_neon = {sign_conv_bytes, sign_conv_pack, row_of, 1};
#endif
