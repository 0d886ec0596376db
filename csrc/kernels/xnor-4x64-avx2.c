/* xnor for AVX2: four pixels by two registers of 32 channels, or one where there are no more.
 *
 * There is no count of bits for registers, but there are tables of sixteen bytes (vpshufb). Four bits of the input choose the table:
 * how many bits differ, for each four bits of the weight. These choose from it, for 32 channels at once. Sums are bytes until one
 * might overflow, then 16 bits, then 32.
 */
#include "avx2.h"

#ifdef ABSTE_X86
#include "lanes.h"
#include "xnor.h"

#include <string.h>

/* Set bits of x < 16; how many differ from x, for each four bits; the same for the four bits of a byte below and those above. */
#define COUNT(x) ((uint8_t)(0x4332322132212110u >> 4 * (x) & 15))
#define FOUR(x, m) COUNT((x) ^ (m)), COUNT((x) ^ ((m) + 1)), COUNT((x) ^ ((m) + 2)), COUNT((x) ^ ((m) + 3))
#define TABLE(x) {FOUR(x, 0), FOUR(x, 4), FOUR(x, 8), FOUR(x, 12)}
#define BYTE(x) {TABLE((x) & 15), TABLE((x) >> 4)}
#define BYTES(x) BYTE(x), BYTE((x) + 1), BYTE((x) + 2), BYTE((x) + 3)
#define BYTES_16(x) BYTES(x), BYTES((x) + 4), BYTES((x) + 8), BYTES((x) + 12)
#define BYTES_64(x) BYTES_16(x), BYTES_16((x) + 16), BYTES_16((x) + 32), BYTES_16((x) + 48)
static const _Alignas(64) uint8_t TABLES[256][2][16] = {BYTES_64(0), BYTES_64(64), BYTES_64(128), BYTES_64(192)};

#define ROOM 7u      /* words until a byte may overflow: 7 * 32 < 256 */
#define REFILLS 292u /* of so many words each, until 16 bits may: 292 * 7 * 32 < 65536 */

/* Sums of P pixels and 32 channels: 0 to 7 and 16 to 23, then 8 to 15 and 24 to 31; and those that were too large for that. */
typedef struct {
    __m256i words[2];
    __m256i large[4];
} wide_sums;

INLINE void widen(__m256i *bytes, wide_sums *sums) {
    const __m256i zero = _mm256_setzero_si256();
    sums->words[0] = _mm256_add_epi16(sums->words[0], _mm256_unpacklo_epi8(*bytes, zero));
    sums->words[1] = _mm256_add_epi16(sums->words[1], _mm256_unpackhi_epi8(*bytes, zero));
    *bytes = zero;
}

/* Else gcc adds what is to be added first, and has no registers left. */
#define IN_ORDER(v) __asm__("" : "+x"(v))

/* Channels 8 k to 8 k + 7. */
INLINE __m256i eight_of(const wide_sums *sums, uint32_t k) {
    return _mm256_cvtepu16_epi32(_mm_load_si128((const __m128i *)(const void *)&sums->words[k % 2] + k / 2));
}

/* Eight pairs of a threshold and its direction, taken apart. */
INLINE void thresholds(const int32_t *pairs, __m256i *t, __m256i *d) {
    const float *p = (const float *)(const void *)pairs;
    const __m256 a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + 8);
    *t = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), 0xD8);
    *d = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xDD)), 0xD8);
}

/* Those of channels 0 to 7 and 16 to 23, in 16 bits: a threshold that does not fit becomes the nearest that does. */
INLINE void thresholds16(const int32_t *pairs, __m256i *t, __m256i *d) {
    __m256i t0, t1, d0, d1;
    thresholds(pairs, &t0, &d0);
    thresholds(pairs + 32, &t1, &d1);
    *t = _mm256_permute4x64_epi64(_mm256_packs_epi32(t0, t1), 0xD8);
    *d = _mm256_permute4x64_epi64(_mm256_packs_epi32(d0, d1), 0xD8);
}

/* These two are seldom called, and not to be written out for each number of pixels. */
TARGET __attribute__((noinline)) static void empty(wide_sums *sums, int count, uint32_t large) {
    for (wide_sums *end = sums + count; sums < end; ++sums) {
        for (uint32_t k = 0; k < 4; ++k) {
            const __m256i eight = eight_of(sums, k);
            sums->large[k] = large ? _mm256_add_epi32(sums->large[k], eight) : eight;
        }
        sums->words[0] = sums->words[1] = _mm256_setzero_si256();
    }
}

__attribute__((noinline)) static void pad(const int32_t *pairs, uint32_t count, int32_t *padded) {
    for (uint32_t m = 0; m < 2 * BLOCK; ++m)
        padded[m] = m < count ? pairs[m] : 0;
}

INLINE void count_some(const run_of_taps *runs, uint32_t count, size_t step, int32_t taps, const destination *to, const int P,
                       const int O) {
    const __m256i zero = _mm256_setzero_si256(), four = _mm256_set1_epi8(15);
    wide_sums sums[4][2];
    __m256i bytes[4][2];
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < O; ++o)
        sums[p][o].words[0] = sums[p][o].words[1] = bytes[p][o] = zero;
    uint32_t room = ROOM, refills = 0, large = 0;
    for (uint32_t r = 0; r < count; ++r) {
        const uint8_t *in = (const uint8_t *)runs[r].in, *weight = (const uint8_t *)runs[r].weight;
        for (uint32_t left = runs[r].words; left;) {
            const uint32_t some = left < room ? left : room;
            for (const uint8_t *end = in + 4 * some; in < end; ++in, weight += BLOCK) {
                __m256i low[2], high[2];
                UNROLL for (int o = 0; o < O; ++o) {
                    const __m256i w = _mm256_load_si256((const __m256i *)(const void *)(weight + 32 * o));
                    low[o] = _mm256_and_si256(w, four);
                    high[o] = _mm256_and_si256(_mm256_srli_epi16(w, 4), four);
                }
                UNROLL for (int p = 0; p < P; ++p) {
                    const __m128i *tables = (const __m128i *)(const void *)TABLES[in[4 * step * (size_t)p]];
                    const __m256i t0 = _mm256_broadcastsi128_si256(_mm_load_si128(tables));
                    const __m256i t1 = _mm256_broadcastsi128_si256(_mm_load_si128(tables + 1));
                    UNROLL for (int o = 0; o < O; ++o) {
                        bytes[p][o] = _mm256_add_epi8(bytes[p][o], _mm256_shuffle_epi8(t0, low[o]));
                        IN_ORDER(bytes[p][o]);
                        bytes[p][o] = _mm256_add_epi8(bytes[p][o], _mm256_shuffle_epi8(t1, high[o]));
                    }
                }
            }
            left -= some, room -= some;
            if (room)
                continue;
            room = ROOM;
            UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < O; ++o) widen(&bytes[p][o], &sums[p][o]);
            if (++refills < REFILLS)
                continue;
            refills = 0;
            for (int p = 0; p < P; ++p)
                empty(sums[p], O, large);
            large = 1;
        }
    }
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < O; ++o) widen(&bytes[p][o], &sums[p][o]);
    int32_t padded[2 * BLOCK];
    const int32_t *pairs = to->thresholds;
    if (pairs && to->channels < 32u * (uint32_t)O) { /* nothing may follow them */
        pad(pairs, 2 * to->channels, padded);
        pairs = padded;
    }
    for (int o = 0; o < O && 32u * (uint32_t)o < to->channels; ++o) {
        const uint32_t left = to->channels - 32 * (uint32_t)o, some = 0xFFFFFFFFu >> (left < 32 ? 32 - left : 0);
        uint32_t set[4] = {0};
        if (pairs && taps < INT16_MAX) {
            __m256i t[2], d[2];
            UNROLL for (int k = 0; k < 2; ++k) thresholds16(pairs + 64 * o + 16 * k, &t[k], &d[k]);
            const __m256i all = _mm256_set1_epi16((int16_t)taps);
            UNROLL for (int p = 0; p < P; ++p) {
                __m256i below[2]; /* t > d * sum */
                UNROLL for (int k = 0; k < 2; ++k) {
                    const __m256i differ = sums[p][o].words[k], sum = _mm256_sub_epi16(all, _mm256_add_epi16(differ, differ));
                    below[k] = _mm256_cmpgt_epi16(t[k], _mm256_sign_epi16(sum, d[k]));
                }
                set[p] = ~(uint32_t)_mm256_movemask_epi8(_mm256_packs_epi16(below[0], below[1]));
            }
        } else {
            const __m256i all = _mm256_set1_epi32(taps);
            UNROLL for (uint32_t k = 0; k < 4; ++k) {
                __m256i sum[4];
                UNROLL for (int p = 0; p < P; ++p) {
                    __m256i differ = eight_of(&sums[p][o], k);
                    if (large)
                        differ = _mm256_add_epi32(differ, sums[p][o].large[k]);
                    sum[p] = _mm256_sub_epi32(all, _mm256_add_epi32(differ, differ));
                }
                if (pairs) {
                    __m256i t, d;
                    thresholds(pairs + 64 * o + 16 * k, &t, &d);
                    UNROLL for (int p = 0; p < P; ++p)
                        set[p] |= (0xFF & ~SET_BITS(_mm256_cmpgt_epi32(t, _mm256_sign_epi32(sum[p], d)))) << 8 * k;
                } else {
                    UNROLL for (int p = 0; p < P; ++p)
                        _mm256_store_si256((__m256i *)(void *)(to->sums[p].i + 32 * o + 8 * k), sum[p]);
                }
            }
        }
        if (pairs)
            UNROLL for (int p = 0; p < P; ++p) to->bits[(size_t)p * to->words + (size_t)o] = set[p] & some;
    }
}

#define KERNEL(P, O)                                                                                                           \
    TARGET static void count_##P##_##O(const run_of_taps *runs, uint32_t count, size_t step, int32_t taps,                     \
                                       const destination *to) {                                                                \
        count_some(runs, count, step, taps, to, P, O);                                                                         \
    }
#define KERNELS(O) KERNEL(1, O) KERNEL(2, O) KERNEL(3, O) KERNEL(4, O)
KERNELS(1)
KERNELS(2)

static const counter COUNTERS[2][5] = {{NULL, count_1_1, count_2_1, count_3_1, count_4_1},
                                       {NULL, count_1_2, count_2_2, count_3_2, count_4_2}};

/* Bytes of the words of 64 channels, taken apart. */
static void pack_bytes(const abste_model *model, const abste_node_record *node, void *memory) {
    xnor_pack(model, node, memory);
    uint8_t *at = memory, bytes[4 * BLOCK];
    for (const uint8_t *end = at + xnor_bytes(model, node); at < end; at += sizeof bytes) {
        for (uint32_t m = 0; m < BLOCK; ++m)
            for (uint32_t b = 0; b < 4; ++b)
                bytes[b * BLOCK + m] = at[4 * m + b];
        memcpy(at, bytes, sizeof bytes);
    }
}

static void row_of(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) {
    xnor_row(job, y, o, n, COUNTERS[n > 32], 4, n > 32 ? 64 : 32, 0);
}

const abste_packed_kernel abste_xnor_avx2 = {xnor_bytes, pack_bytes, row_of, 0};
#endif
