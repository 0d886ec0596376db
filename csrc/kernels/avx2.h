/* What the kernels for AVX2 share. */
#ifndef ABSTE_AVX2_H
#define ABSTE_AVX2_H

#include "../src/internal.h"

#ifdef ABSTE_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2")))
#define LANES 8
#define SET_BITS(mask) (uint32_t)_mm256_movemask_ps((__m256)(mask))
#define SELECT(mask, a, b) _mm256_blendv_ps(b, a, (__m256)(mask))

extern const abste_packed_kernel abste_conv_avx2, abste_sign_conv_avx2, abste_xnor_avx2;

#endif
#endif
