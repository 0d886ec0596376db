/* sign_conv for AVX-512: sums from tables of four inputs, four pixels by 64 channels.
 *
 * Four inputs have sixteen sums with signs, which fit into one register; four bits of the weight choose one, for sixteen output
 * channels at once (vpermps). That is a quarter of the additions, in the order of docs/format.md. The tables of a block of 32
 * channels serve every tap of the kernel's row and all output channels before the next block is looked at.
 */
#include "avx512.h"

#ifdef ABSTE_X86

#define MOST_COLUMNS 72u /* input pixels that there are tables for at a time: 512 bytes each */
#define MOST_SUMS 128u   /* blocks of 64 sums that are added to at a time: 256 bytes each */
#define MOST_OUTPUTS 32u /* output pixels at a time */

typedef struct {
    _Alignas(64) float sums[8][16]; /* of four channels each; number m adds those whose bit in m is set, subtracts the others */
} tables;

/* How far the taps of a row reach. */
static uint32_t reach_of(const abste_node_record *node) { return (node->kernel[1] - 1u) * node->dilation[1]; }

size_t abste_sign_conv_bytes_avx512(const abste_model *model, const abste_node_record *node) {
    if (node->groups != 1 || node->kernel[1] > 64 || reach_of(node) >= MOST_COLUMNS)
        return 0;
    const uint64_t taps = (uint64_t)node->kernel[0] * node->kernel[1];
    const uint64_t blocks = (written_by(model, node)->c + BLOCK - 1) / BLOCK;
    return (size_t)(blocks * BLOCK * taps * words_of(value_at(model, node->in0)->c) * sizeof(uint32_t));
}

/* For 64 output channels together: rows, blocks of 32 input channels, taps. Channels that are missing count as +0, so their bits are set. */
void abste_sign_conv_pack_avx512(const abste_model *model, const abste_node_record *node, void *memory) {
    const uint32_t C = value_at(model, node->in0)->c, c = written_by(model, node)->c;
    const uint32_t kh = node->kernel[0], kw = node->kernel[1];
    const uint32_t *weight = blob_data(model, node->weight);
    uint32_t *out = memory;
    for (uint32_t o = 0; o < c; o += BLOCK)
        for (uint32_t i = 0; i < kh; ++i)
            for (uint32_t k = 0; k < C; k += 32)
                for (uint32_t j = 0; j < kw; ++j)
                    for (uint32_t m = 0; m < BLOCK; ++m) {
                        const uint32_t count = C - k < 32 ? C - k : 32;
                        const uint64_t at = (((uint64_t)(o + m) * kh + i) * kw + j) * C + k;
                        const uint32_t missing = count < 32 ? 0xFFFFFFFFu << count : 0;
                        *out++ = o + m < c ? bits_at(weight, at, count) | missing : 0;
                    }
}

TARGET static inline __m512 turned(float number, __m512i signs) {
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(_mm512_set1_ps(number)), signs));
}

/* The tables of `count` channels of a pixel. */
TARGET static void tabulate(const float *in, uint32_t count, tables *out) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), one = _mm512_set1_epi32(1);
    __m512i signs[4]; /* set where the bit is clear */
    UNROLL for (int b = 0; b < 4; ++b)
        signs[b] = _mm512_slli_epi32(_mm512_andnot_si512(_mm512_srl_epi32(lane, _mm_cvtsi32_si128(b)), one), 31);
    for (uint32_t k = 0; k < count; k += 4) {
        float four[4] = {0};
        for (uint32_t b = 0; b < 4 && k + b < count; ++b)
            four[b] = in[k + b];
        const __m512 low = _mm512_add_ps(turned(four[0], signs[0]), turned(four[1], signs[1]));
        const __m512 high = _mm512_add_ps(turned(four[2], signs[2]), turned(four[3], signs[3]));
        _mm512_store_ps(out->sums[k / 4], _mm512_add_ps(low, high));
    }
}

/* Adds the groups of a block, tap by tap, to the sums of P pixels and 64 channels. `in` are the tables under tap 0 of pixel 0;
 * `step` further are those of the next pixel, `dilation` further those of the next tap. */
#define KERNEL(P)                                                                                                               \
    TARGET static void add_##P(const tables *in, size_t step, size_t dilation, const uint32_t *weight, uint32_t taps,           \
                               uint32_t groups, abste_sums *sums) {                                                             \
        __m512 total[P][4];                                                                                                     \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < 4; ++o) total[p][o] = _mm512_load_ps(sums[p].f + 16 * o); \
        for (uint32_t j = 0; j < taps; ++j, in += dilation, weight += BLOCK) {                                                  \
            __m512i which[4];                                                                                                   \
            UNROLL for (int o = 0; o < 4; ++o) which[o] = _mm512_load_si512(weight + 16 * o);                                   \
            for (uint32_t g = 0; g < groups; ++g) {                                                                             \
                UNROLL for (int p = 0; p < P; ++p) {                                                                            \
                    const __m512 table = _mm512_load_ps(in[p * step].sums[g]);                                                  \
                    UNROLL for (int o = 0; o < 4; ++o)                                                                          \
                        total[p][o] = _mm512_add_ps(total[p][o], _mm512_permutexvar_ps(which[o], table));                       \
                }                                                                                                               \
                UNROLL for (int o = 0; o < 4; ++o) which[o] = _mm512_srli_epi32(which[o], 4);                                   \
            }                                                                                                                   \
        }                                                                                                                       \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < 4; ++o) _mm512_store_ps(sums[p].f + 16 * o, total[p][o]); \
    }

KERNEL(1)
KERNEL(2)
KERNEL(4)

void abste_sign_conv_avx512(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) {
    const abste_node_record *node = job->node;
    const uint32_t kh = node->kernel[0], kw = node->kernel[1], words = words_of(job->C), stride = node->stride[1];
    const uint32_t dilation = node->dilation[1], reach = reach_of(node), blocks = (o + n + BLOCK - 1) / BLOCK;
    const int64_t row = (int64_t)y * node->stride[0] - node->padding[0];
    const abste_range is = taps_inside(row, kh, node->dilation[0], job->H);
    _Alignas(64) tables in[MOST_COLUMNS];
    _Alignas(64) abste_sums sums[MOST_SUMS];
    uint32_t width = (MOST_COLUMNS - 1 - reach) / stride + 1; /* output pixels at a time */
    width = width < MOST_OUTPUTS ? width : MOST_OUTPUTS;
    width = width < job->w ? width : job->w;
    for (uint32_t first = o / BLOCK; first < blocks;) {
        uint32_t some = MOST_SUMS / width ? MOST_SUMS / width : 1;
        some = some < blocks - first ? some : blocks - first;
        for (uint32_t x = 0; x < job->w;) {
            const uint32_t pixels = job->w - x < width ? job->w - x : width;
            const int64_t column = (int64_t)x * stride - node->padding[1];
            for (uint32_t k = 0; k < some * pixels; ++k)
                for (uint32_t m = 0; m < BLOCK; ++m)
                    sums[k].f[m] = 0;
            for (uint32_t i = is.first; i < is.last; ++i) {
                const float *line = job->in + (size_t)(row + (int64_t)i * node->dilation[0]) * job->W * job->C;
                for (uint32_t word = 0; word < words; ++word) {
                    const uint32_t left = job->C - 32 * word, count = left < 32 ? left : 32;
                    for (uint32_t s = 0; s <= (pixels - 1) * stride + reach; ++s)
                        if (column + s >= 0 && column + s < (int64_t)job->W)
                            tabulate(line + (size_t)(column + s) * job->C + 32 * word, count, &in[s]);
                    for (uint32_t b = 0; b < some; ++b) {
                        const uint32_t *weight = (const uint32_t *)job->packed +
                                                 (((size_t)(first + b) * kh + i) * words + word) * kw * BLOCK;
                        for (uint32_t p = 0; p < pixels;) {
                            const int64_t start = column + (int64_t)p * stride;
                            const abste_range js = taps_inside(start, kw, dilation, job->W);
                            const uint32_t taps = js.last - js.first;
                            uint32_t alike = pixels_alike(job, start, js, pixels - p);
                            const tables *under = &in[p * stride + js.first * dilation];
                            abste_sums *to = &sums[b * pixels + p];
                            const uint32_t *signs = weight + (size_t)js.first * BLOCK, groups = (count + 3) / 4;
                            p += alike;
                            for (; alike >= 4; alike -= 4, under += 4 * stride, to += 4)
                                add_4(under, stride, dilation, signs, taps, groups, to);
                            for (; alike >= 2; alike -= 2, under += 2 * stride, to += 2)
                                add_2(under, stride, dilation, signs, taps, groups, to);
                            if (alike)
                                add_1(under, stride, dilation, signs, taps, groups, to);
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
