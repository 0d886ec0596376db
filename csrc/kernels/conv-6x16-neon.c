/* conv for NEON. */
#include "neon.h"

#ifdef ABSTE_ARM
#include "conv-6x16.h"

const abste_packed_kernel abste_conv_neon = {conv_bytes, conv_pack, conv_six_row, 0};
#endif
