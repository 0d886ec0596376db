/* What the kernels for NEON share. */
#ifndef ABSTE_NEON_H
#define ABSTE_NEON_H

#include "../src/internal.h"

#ifdef ABSTE_ARM
#include <arm_neon.h>

#define TARGET /* every such processor has it */
#define LANES 4
#define SET_BITS(mask) vaddvq_u32(vandq_u32((uint32x4_t)(mask), (uint32x4_t){1, 2, 4, 8}))
#define SELECT(mask, a, b) (lanes)vbslq_f32((uint32x4_t)(mask), (float32x4_t)(a), (float32x4_t)(b))

extern const abste_packed_kernel abste_conv_neon, abste_sign_conv_neon, abste_xnor_neon;

#endif
#endif
