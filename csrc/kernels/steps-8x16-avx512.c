/* Steps with AVX-512, and the table of its kernels. */
#include "avx512.h"

#ifdef ABSTE_X86
#include "finish.h"
#include "window.h"

const abste_variant abste_variant_avx512 = {
    .packed = {[OP_CONV] = &abste_conv_avx512, [OP_SIGN_CONV] = &abste_sign_conv_avx512, [OP_XNOR] = &abste_xnor_avx512},
    .in_place = window_kernel,
    .int8 = &abste_int8_avx512,
    .finish = finish,
};
#endif
