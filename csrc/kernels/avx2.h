/* What the kernels for AVX2 share. */
#ifndef ABSTE_AVX2_H
#define ABSTE_AVX2_H

#include "../src/internal.h"

#ifdef ABSTE_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,f16c")))
#define LANES 8
#define FROM_HALVES(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p)))
#define SET_BITS(mask) (uint32_t)_mm256_movemask_ps((__m256)(mask))
#define SELECT(mask, a, b) _mm256_blendv_ps(b, a, (__m256)(mask))

size_t abste_xnor_bytes_avx2(const abste_model *model, const abste_node_record *node);
void abste_xnor_pack_avx2(const abste_model *model, const abste_node_record *node, void *memory);
void abste_xnor_avx2(const abste_job *job, uint32_t y, uint32_t o, uint32_t n);
size_t abste_sign_conv_bytes_avx2(const abste_model *model, const abste_node_record *node);
void abste_sign_conv_pack_avx2(const abste_model *model, const abste_node_record *node, void *memory);
void abste_sign_conv_avx2(const abste_job *job, uint32_t y, uint32_t o, uint32_t n);
void abste_conv_avx2(const abste_job *job, uint32_t y, uint32_t o, uint32_t n);

#endif
#endif
