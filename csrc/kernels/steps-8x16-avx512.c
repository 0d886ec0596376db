/* Steps with AVX-512, and the table of its kernels. */
#include "avx512.h"

#ifdef ABSTE_X86
#include "finish.h"
#include "window.h"

static size_t packed_bytes(const abste_model *model, const abste_node_record *node) {
    return node->op == OP_XNOR                        ? abste_xnor_bytes_avx512(model, node)
           : node->op == OP_SIGN_CONV                 ? abste_sign_conv_bytes_avx512(model, node)
           : node->op == OP_CONV && node->groups == 1 ? abste_conv_bytes_avx512(model, node)
                                                      : 0;
}

static void pack(const abste_model *model, const abste_node_record *node, void *memory) {
    (node->op == OP_XNOR        ? abste_xnor_pack_avx512
     : node->op == OP_SIGN_CONV ? abste_sign_conv_pack_avx512
                                : abste_conv_pack_avx512)(model, node, memory);
}

const abste_variant abste_variant_avx512 = {.packed_bytes = packed_bytes,
                                            .in_place = window_kernel,
                                            .pack = pack,
                                            .rows = {[OP_CONV] = abste_conv_avx512,
                                                     [OP_SIGN_CONV] = abste_sign_conv_avx512,
                                                     [OP_XNOR] = abste_xnor_avx512},
                                            .whole = {[OP_SIGN_CONV] = 1},
                                            .int8 = {abste_int8_bytes_avx512, abste_int8_pack_avx512, abste_int8_most_avx512,
                                                     abste_int8_row_avx512, abste_int8_avx512},
                                            .finish = finish};
#endif
