/* conv for AVX2. */
#include "avx2.h"

#ifdef ABSTE_X86
#include "conv-6x16.h"

const abste_packed_kernel abste_conv_avx2 = {conv_bytes, conv_pack, conv_six_row, 0};
#endif
