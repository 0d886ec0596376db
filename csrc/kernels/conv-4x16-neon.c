/* conv for NEON: four pixels by 16 output channels, or one by 32. */
#include "neon.h"

#ifdef ABSTE_ARM
#define TOTALS 16
#include "conv.h"

void abste_conv_neon(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) { conv_row(job, y, o, n); }
#endif
