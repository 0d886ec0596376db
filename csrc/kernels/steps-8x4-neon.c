/* Steps with NEON, and the table of its kernels. */
#include "neon.h"

#ifdef ABSTE_ARM
#include "finish.h"
#include "window.h"

static size_t packed_bytes(const abste_model *model, const abste_node_record *node) {
    return node->op == OP_XNOR        ? abste_xnor_bytes_neon(model, node)
           : node->op == OP_SIGN_CONV ? abste_sign_conv_bytes_neon(model, node)
                                      : 0;
}

static abste_row_kernel in_place(const abste_model *model, const abste_node_record *node) {
    return node->op == OP_CONV && node->groups == 1 ? abste_conv_neon : window_kernel(model, node);
}

static void pack(const abste_model *model, const abste_node_record *node, void *memory) {
    (node->op == OP_XNOR ? abste_xnor_pack_neon : abste_sign_conv_pack_neon)(model, node, memory);
}

const abste_variant abste_variant_neon = {.packed_bytes = packed_bytes,
                                          .in_place = in_place,
                                          .pack = pack,
                                          .rows = {[OP_SIGN_CONV] = abste_sign_conv_neon,
                                                   [OP_XNOR] = abste_xnor_neon},
                                          .whole = {[OP_SIGN_CONV] = 1},
                                          .finish = finish};
#endif
