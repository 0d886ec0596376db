/* Steps with AVX2, and the table of its kernels. */
#include "avx2.h"

#ifdef ABSTE_X86
#include "finish.h"
#include "window.h"

const abste_variant abste_variant_avx2 = {
    .packed = {[OP_CONV] = &abste_conv_avx2, [OP_SIGN_CONV] = &abste_sign_conv_avx2, [OP_XNOR] = &abste_xnor_avx2},
    .in_place = window_kernel,
    .finish = finish,
};
#endif
