/* Steps with AVX2, and the table of its kernels. */
#include "avx2.h"

#ifdef ABSTE_X86
#include "finish.h"
#include "window.h"

static size_t packed_bytes(const abste_model *model, const abste_node_record *node) {
    return node->op == OP_XNOR        ? abste_xnor_bytes_avx2(model, node)
           : node->op == OP_SIGN_CONV ? abste_sign_conv_bytes_avx2(model, node)
                                      : 0;
}

/* What reads the weight where it is, or has none. */
static abste_row_kernel in_place(const abste_model *model, const abste_node_record *node) {
    return node->op == OP_CONV && node->groups == 1 ? abste_conv_avx2 : window_kernel(model, node);
}

static void pack(const abste_model *model, const abste_node_record *node, void *memory) {
    (node->op == OP_XNOR ? abste_xnor_pack_avx2 : abste_sign_conv_pack_avx2)(model, node, memory);
}

const abste_variant abste_variant_avx2 = {.packed_bytes = packed_bytes,
                                          .in_place = in_place,
                                          .pack = pack,
                                          .rows = {[OP_SIGN_CONV] = abste_sign_conv_avx2, [OP_XNOR] = abste_xnor_avx2},
                                          .whole = {[OP_SIGN_CONV] = 1},
                                          .finish = finish};
#endif
