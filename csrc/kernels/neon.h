/* What the kernels for NEON share. */
#ifndef ABSTE_NEON_H
#define ABSTE_NEON_H

#include "../src/internal.h"

#ifdef ABSTE_ARM
#include <arm_neon.h>

size_t abste_xnor_bytes_neon(const abste_model *model, const abste_node_record *node);
void abste_xnor_pack_neon(const abste_model *model, const abste_node_record *node, void *memory);
void abste_xnor_neon(const abste_job *job, uint32_t y, uint32_t o, uint32_t n);
size_t abste_sign_conv_bytes_neon(const abste_model *model, const abste_node_record *node);
void abste_sign_conv_pack_neon(const abste_model *model, const abste_node_record *node, void *memory);
void abste_sign_conv_neon(const abste_job *job, uint32_t y, uint32_t o, uint32_t n);

#endif
#endif
