/* What the kernels for NEON share. */
#ifndef ABSTE_NEON_H
#define ABSTE_NEON_H

#include "../src/internal.h"

#ifdef ABSTE_ARM
#include <arm_neon.h>

#define TARGET /* every such processor has it */
#define LANES 4
#define FROM_HALVES(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))
#define SET_BITS(mask) vaddvq_u32(vandq_u32((uint32x4_t)(mask), (uint32x4_t){1, 2, 4, 8}))
#define SELECT(mask, a, b) (lanes)vbslq_f32((uint32x4_t)(mask), (float32x4_t)(a), (float32x4_t)(b))

void abste_conv_neon(const abste_job *job, uint32_t y, uint32_t o, uint32_t n);
size_t abste_xnor_bytes_neon(const abste_model *model, const abste_node_record *node);
void abste_xnor_pack_neon(const abste_model *model, const abste_node_record *node, void *memory);
void abste_xnor_neon(const abste_job *job, uint32_t y, uint32_t o, uint32_t n);
size_t abste_sign_conv_bytes_neon(const abste_model *model, const abste_node_record *node);
void abste_sign_conv_pack_neon(const abste_model *model, const abste_node_record *node, void *memory);
void abste_sign_conv_neon(const abste_job *job, uint32_t y, uint32_t o, uint32_t n);

#endif
#endif
