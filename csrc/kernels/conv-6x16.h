/* conv in registers of less than sixteen floats: six pixels by 16 output channels, or one by 64. */
#ifndef ABSTE_CONV_6X16_H
#define ABSTE_CONV_6X16_H

#define OUTPUTS 16u
#include "conv.h"

/* A pixel alone takes more channels at once: a sum waits for itself, eight registers of them do not. */
TARGET static void sum_1(const conv_place *at, uint32_t n, abste_sums *sums) { conv_channels(at, n, 1, BLOCK / OUTPUTS, sums); }
TARGET static void sum_2(const conv_place *at, uint32_t n, abste_sums *sums) { conv_channels(at, n, 2, 2, sums); }
TARGET static void sum_4(const conv_place *at, uint32_t n, abste_sums *sums) { conv_channels(at, n, 4, 1, sums); }
TARGET static void sum_6(const conv_place *at, uint32_t n, abste_sums *sums) { conv_channels(at, n, 6, 1, sums); }

static const conv_summer SUMMERS[] = {{6, sum_6}, {4, sum_4}, {2, sum_2}, {1, sum_1}};

static void conv_six_row(const abste_job *job, uint32_t y, uint32_t o, uint32_t n) { conv_row(job, y, o, n, SUMMERS); }

#endif
