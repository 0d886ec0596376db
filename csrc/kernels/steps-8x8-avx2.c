/* Steps with AVX2, and the table of its kernels. */
#include "avx2.h"

#ifdef ABSTE_X86
#include "steps.h"

static size_t packed_bytes(const abste_model *model, const abste_node_record *node) {
    (void)model, (void)node;
    return 0;
}

/* What reads the weight where it is. */
static int in_place(const abste_node_record *node) { return node->op == OP_CONV && node->groups == 1; }

static void pack(const abste_model *model, const abste_node_record *node, void *memory) {
    (void)model, (void)node, (void)memory;
}

const abste_variant abste_variant_avx2 = {.packed_bytes = packed_bytes,
                                          .in_place = in_place,
                                          .pack = pack,
                                          .rows = {[OP_CONV] = abste_conv_avx2},
                                          .finish = finish};
#endif
