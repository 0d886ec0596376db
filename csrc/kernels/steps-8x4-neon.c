/* Steps with NEON, and the table of its kernels. */
#include "neon.h"

#ifdef ABSTE_ARM
#include "finish.h"
#include "window.h"

const abste_variant abste_variant_neon = {
    .packed = {[OP_CONV] = &abste_conv_neon, [OP_SIGN_CONV] = &abste_sign_conv_neon, [OP_XNOR] = &abste_xnor_neon},
    .in_place = window_kernel,
    .finish = finish,
};
#endif
