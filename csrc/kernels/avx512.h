/* What the kernels for AVX-512 share. */
#ifndef ABSTE_AVX512_H
#define ABSTE_AVX512_H

#include "../src/internal.h"

#ifdef ABSTE_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx512vnni,bmi2")))
#define LANES 16
#define LESS(a, b) _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)
#define AT_LEAST(a, b) _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ)
#define AT_LEAST_INTEGER(a, b) _mm512_cmpge_epi32_mask((__m512i)(a), (__m512i)(b))
#define SELECT(mask, a, b) _mm512_mask_blend_ps(mask, b, a)
#define WHERE_NOT(mask, v) _mm512_mask_mov_ps(v, mask, _mm512_setzero_ps())
#define SET_BITS(mask) (uint32_t)(mask)
#define LOAD_FEW(p, some) _mm512_maskz_loadu_ps((__mmask16)((1u << (some)) - 1), p)
#define STORE_FEW(p, v, some) _mm512_mask_storeu_ps(p, (__mmask16)((1u << (some)) - 1), v)

extern const abste_packed_kernel abste_conv_avx512, abste_sign_conv_avx512, abste_xnor_avx512;
extern const abste_int8_kernel abste_int8_avx512;

/* A number that all lanes share, read from memory by the operation itself: that is free, while a broadcast to a register, which
 * compilers make of it when it is used twice, takes the place of an addition. */
#define SHARED(NAME, INSTRUCTION)                                                                                               \
    TARGET static inline __m512 NAME(__m512 lanes, const float *number) {                                                       \
        __m512 result;                                                                                                          \
        __asm__(INSTRUCTION " %2%{1to16%}, %1, %0" : "=v"(result) : "v"(lanes), "m"(*number));                                  \
        return result;                                                                                                          \
    }
SHARED(times_shared, "vmulps")
SHARED(xor_shared, "vxorps")

/* Pairs of a threshold and its direction, taken apart. */
TARGET static inline void thresholds(const int32_t *pairs, __mmask16 some, __m512i *t, __m512i *d) {
    const uint32_t twice = _pdep_u32(some, 0x55555555u) * 3;
    const __m512i a = _mm512_maskz_loadu_epi32((__mmask16)twice, pairs);
    const __m512i b = _mm512_maskz_loadu_epi32((__mmask16)(twice >> 16), pairs + 16);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    *t = _mm512_permutex2var_epi32(a, even, b);
    *d = _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
}

#endif
#endif
