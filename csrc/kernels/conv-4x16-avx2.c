/* conv for AVX2: four pixels by 16 output channels, or one by 64. */
#include "avx2.h"

#ifdef ABSTE_X86
#define TOTALS 8
#include "conv.h"

void abste_conv_avx2(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) { conv_row(job, y, o, n); }
#endif
