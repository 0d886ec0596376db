/* xnor for AVX-512 with VPOPCNTDQ: seven pixels by two registers of sixteen channels. */
#include "avx512.h"

#ifdef ABSTE_X86
#include "steps.h"
#include "xnor.h"

#define KERNEL(P)                                                                                                               \
    TARGET static void count_##P(const run_of_taps *runs, uint32_t count, size_t step, int32_t taps, const destination *to) {   \
        __m512i total[P][2];                                                                                                    \
        UNROLL for (int p = 0; p < P; ++p) total[p][0] = total[p][1] = _mm512_setzero_si512();                                  \
        for (uint32_t r = 0; r < count; ++r) {                                                                                  \
            const uint32_t *in = runs[r].in, *weight = runs[r].weight + to->first;                                              \
            for (uint32_t t = 0; t < runs[r].words; ++t, weight += BLOCK) {                                                     \
                const __m512i w0 = _mm512_load_si512(weight), w1 = _mm512_load_si512(weight + 16);                              \
                UNROLL for (int p = 0; p < P; ++p) {                                                                            \
                    const __m512i bits = _mm512_set1_epi32((int32_t)in[p * step + t]);                                          \
                    total[p][0] = _mm512_add_epi32(total[p][0], _mm512_popcnt_epi32(_mm512_xor_si512(w0, bits)));               \
                    total[p][1] = _mm512_add_epi32(total[p][1], _mm512_popcnt_epi32(_mm512_xor_si512(w1, bits)));               \
                }                                                                                                               \
            }                                                                                                                   \
        }                                                                                                                       \
        const __m512i all = _mm512_set1_epi32(taps);                                                                            \
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < 2; ++o)                                                   \
            total[p][o] = _mm512_sub_epi32(all, _mm512_slli_epi32(total[p][o], 1));                                             \
        if (to->thresholds) {                                                                                                   \
            __m512i t[2], d[2];                                                                                                 \
            UNROLL for (int o = 0; o < 2; ++o)                                                                                  \
                thresholds(to->thresholds + 32 * o, (__mmask16)(to->some >> 16 * o), &t[o], &d[o]);                             \
            const __mmask16 n0 = _mm512_movepi32_mask(d[0]), n1 = _mm512_movepi32_mask(d[1]);                                   \
            const __m512i zero = _mm512_setzero_si512();                                                                        \
            UNROLL for (int p = 0; p < P; ++p) { /* d * sum >= t */                                                             \
                const __m512i s0 = _mm512_mask_sub_epi32(total[p][0], n0, zero, total[p][0]);                                   \
                const __m512i s1 = _mm512_mask_sub_epi32(total[p][1], n1, zero, total[p][1]);                                   \
                const uint32_t low = _mm512_cmpge_epi32_mask(s0, t[0]), high = _mm512_cmpge_epi32_mask(s1, t[1]);               \
                to->bits[p * to->words] = (low | high << 16) & to->some;                                                        \
            }                                                                                                                   \
        } else if (to->job) {                                                                                                   \
            uint32_t set[P] = {0};                                                                                              \
            UNROLL for (int o = 0; o < 2; ++o) {                                                                                \
                if (to->some >> 16 * o == 0)                                                                                    \
                    break;                                                                                                      \
                const uint32_t some = to->channels - 16 * o < 16 ? to->channels - 16 * o : 16;                                  \
                lanes v[P];                                                                                                     \
                UNROLL for (int p = 0; p < P; ++p) v[p] = _mm512_cvtepi32_ps(total[p][o]);                                      \
                step_lanes(to->job, to->y, to->x, to->o + 16 * o, some, P, v);                                                  \
                store_pixels(to->job, to->y, to->x, to->o + 16 * o, some, P, v);                                                \
                UNROLL for (int p = 0; p < P; ++p)                                                                              \
                    set[p] |= (uint32_t)_mm512_cmp_ps_mask(v[p], _mm512_setzero_ps(), _CMP_GE_OQ) << 16 * o;                    \
            }                                                                                                                   \
            if (to->bits)                                                                                                       \
                UNROLL for (int p = 0; p < P; ++p) to->bits[p * to->words] = set[p] & to->some;                                 \
        } else {                                                                                                                \
            UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < 2; ++o)                                               \
                _mm512_store_si512(to->sums[p].i + to->first + 16 * o, total[p][o]);                                            \
        }                                                                                                                       \
    }

KERNEL(1)
KERNEL(2)
KERNEL(3)
KERNEL(4)
KERNEL(5)
KERNEL(6)
KERNEL(7)

static const counter COUNTERS[8] = {NULL, count_1, count_2, count_3, count_4, count_5, count_6, count_7};

size_t abste_xnor_bytes_avx512(const abste_model *model, const abste_node_record *node) { return xnor_bytes(model, node); }

void abste_xnor_pack_avx512(const abste_model *model, const abste_node_record *node, void *memory) { xnor_pack(model, node, memory); }

void abste_xnor_avx512(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) { xnor_row(job, y, o, n, COUNTERS, 7, 32, 1); }
#endif
