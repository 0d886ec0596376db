/* xnor for NEON: two pixels by eight registers of four channels.
 *
 * A step is eor, cnt and add for 128 products. cnt counts in bytes and so do the sums, which are widened before they can overflow.
 * A word of the input is broadcast for eight such steps, by ld1r; the weights come by plain loads, which do not keep the vector
 * pipes from their work. More pixels at a time would save neither, and would leave fewer registers.
 */
#include "neon.h"
#include "xnor.h"

#ifdef ABSTE_ARM
#include <string.h>

#define ROOM 31u /* words until a byte may be full: 31 * 8 < 256 */

/* A bit for each lane that is set, of eight registers of masks. */
static inline uint32_t bits_of(const uint32x4_t *masks) {
    static const uint8_t places[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint16x8_t halves[4];
    UNROLL for (int k = 0; k < 4; ++k)
        halves[k] = vuzp1q_u16(vreinterpretq_u16_u32(masks[2 * k]), vreinterpretq_u16_u32(masks[2 * k + 1]));
    const uint8x16_t place = vld1q_u8(places);
    const uint8x16_t low = vuzp1q_u8(vreinterpretq_u8_u16(halves[0]), vreinterpretq_u8_u16(halves[1]));
    const uint8x16_t high = vuzp1q_u8(vreinterpretq_u8_u16(halves[2]), vreinterpretq_u8_u16(halves[3]));
    uint8x16_t sum = vpaddq_u8(vandq_u8(low, place), vandq_u8(high, place));
    sum = vpaddq_u8(sum, sum);
    sum = vpaddq_u8(sum, sum);
    return vgetq_lane_u32(vreinterpretq_u32_u8(sum), 0);
}

#define KERNEL(P)                                                                                                               \
    static void count_##P(const run_of_taps *runs, uint32_t count, size_t step, int32_t taps, const destination *to) {          \
        uint8x16_t bytes[P][8];                                                                                                 \
        uint32x4_t total[P][8];                                                                                                 \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < 8; ++o) {                                                 \
            bytes[p][o] = vdupq_n_u8(0);                                                                                        \
            total[p][o] = vdupq_n_u32(0);                                                                                       \
        }                                                                                                                       \
        uint32_t room = ROOM;                                                                                                   \
        for (uint32_t r = 0; r < count; ++r) {                                                                                  \
            const uint32_t *in = runs[r].in, *weight = runs[r].weight + to->first;                                              \
            for (uint32_t left = runs[r].words; left;) {                                                                        \
                if (!room) {                                                                                                    \
                    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < 8; ++o) {                                     \
                        total[p][o] = vpadalq_u16(total[p][o], vpaddlq_u8(bytes[p][o]));                                        \
                        bytes[p][o] = vdupq_n_u8(0);                                                                            \
                    }                                                                                                           \
                    room = ROOM;                                                                                                \
                }                                                                                                               \
                const uint32_t some = left < room ? left : room;                                                                \
                for (const uint32_t *end = in + some; in < end; ++in, weight += BLOCK) {                                        \
                    uint8x16_t bits[P];                                                                                         \
                    UNROLL for (int p = 0; p < P; ++p) bits[p] = vreinterpretq_u8_u32(vld1q_dup_u32(in + p * step));            \
                    UNROLL for (int o = 0; o < 8; ++o) {                                                                        \
                        const uint8x16_t w = vreinterpretq_u8_u32(vld1q_u32(weight + 4 * o));                                   \
                        UNROLL for (int p = 0; p < P; ++p)                                                                      \
                            bytes[p][o] = vaddq_u8(bytes[p][o], vcntq_u8(veorq_u8(w, bits[p])));                                \
                    }                                                                                                           \
                }                                                                                                               \
                left -= some, room -= some;                                                                                     \
            }                                                                                                                   \
        }                                                                                                                       \
        int32x4_t sums[P][8];                                                                                                   \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < 8; ++o) {                                                 \
            total[p][o] = vpadalq_u16(total[p][o], vpaddlq_u8(bytes[p][o]));                                                    \
            sums[p][o] = vsubq_s32(vdupq_n_s32(taps), vreinterpretq_s32_u32(vshlq_n_u32(total[p][o], 1)));                      \
        }                                                                                                                       \
        if (to->thresholds) {                                                                                                   \
            const int32_t *pairs = to->thresholds;                                                                              \
            int32_t padded[64] = {0};                                                                                           \
            if (to->channels < 32) { /* nothing may follow them */                                                              \
                memcpy(padded, pairs, 2 * to->channels * sizeof *pairs);                                                        \
                pairs = padded;                                                                                                 \
            }                                                                                                                   \
            UNROLL for (int p = 0; p < P; ++p) {                                                                                \
                uint32x4_t masks[8];                                                                                            \
                UNROLL for (int o = 0; o < 8; ++o) { /* d * sum >= t */                                                         \
                    const int32x4x2_t pair = vld2q_s32(pairs + 8 * o);                                                          \
                    masks[o] = vcgeq_s32(vmulq_s32(pair.val[1], sums[p][o]), pair.val[0]);                                      \
                }                                                                                                               \
                to->bits[p * to->words] = bits_of(masks) & to->some;                                                            \
            }                                                                                                                   \
        } else {                                                                                                                \
            UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < 8; ++o)                                               \
                vst1q_s32(to->sums[p].i + to->first + 4 * o, sums[p][o]);                                                       \
        }                                                                                                                       \
    }

KERNEL(1)
KERNEL(2)

static const counter COUNTERS[3] = {NULL, count_1, count_2};

static void row_of(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) { xnor_row(job, y, o, n, COUNTERS, 2, 32, 0); }

const abste_packed_kernel abste_xnor_neon = {xnor_bytes, xnor_pack, row_of, 0};
#endif
