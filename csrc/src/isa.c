/* Which instruction sets the machine has, and the weights in the order that their kernels want. */
#include "internal.h"

#ifdef ABSTE_X86
#include <cpuid.h>

/* Whether the processor has what cpuid 1 tells in c, and the system saves these registers; cpuid 7 is left in b and c. */
static int has(unsigned features, unsigned registers, unsigned *b, unsigned *c) {
    unsigned a, d;
    if (!__get_cpuid(1, &a, b, c, &d) || !(*c & bit_OSXSAVE) || (*c & features) != features)
        return 0;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & registers) == registers && __get_cpuid_count(7, 0, &a, b, c, &d);
}

static int has_avx2(void) {
    unsigned b, c;
    return has(bit_AVX, 0x6, &b, &c) && (b & bit_AVX2);
}

static int has_avx512(void) {
    unsigned b, c;
    if (!has(bit_AVX, 0xE6, &b, &c))
        return 0;
    const unsigned needed = bit_BMI2 | bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    return (b & needed) == needed && (c & bit_AVX512VPOPCNTDQ) && (c & bit_AVX512VNNI);
}
#endif

static const abste_variant *const VARIANTS[ABSTE_ISA_COUNT] = {
    [ABSTE_SCALAR] = NULL,
#ifdef ABSTE_ARM
    [ABSTE_NEON] = &abste_variant_neon,
#endif
#ifdef ABSTE_X86
    [ABSTE_AVX2] = &abste_variant_avx2,
    [ABSTE_AVX512] = &abste_variant_avx512,
#endif
};

int abste_has(abste_isa isa) {
    switch (isa) {
    case ABSTE_SCALAR:
        return 1;
#ifdef ABSTE_ARM
    case ABSTE_NEON:
        return 1;
#endif
#ifdef ABSTE_X86
    case ABSTE_AVX2:
        return has_avx2();
    case ABSTE_AVX512:
        return has_avx512();
#endif
    default:
        return 0;
    }
}

abste_isa abste_fastest(void) {
    unsigned isa = ABSTE_ISA_COUNT - 1;
    while (!abste_has((abste_isa)isa))
        --isa;
    return (abste_isa)isa;
}

const char *abste_isa_name(abste_isa isa) {
    static const char *const names[ABSTE_ISA_COUNT] = {"scalar", "neon", "avx2", "avx512"};
    return (unsigned)isa < ABSTE_ISA_COUNT ? names[isa] : NULL;
}

int abste_has_int8(abste_isa isa) { return abste_has(isa) && VARIANTS[isa] && VARIANTS[isa]->int8; }

size_t abste_node_packed_bytes(const abste_model *model, const abste_variant *variant, uint32_t int8, const abste_node_record *node,
                               const abste_packed_kernel **kernel) {
    const abste_packed_kernel *found = abste_int8(model, int8, node) ? &int8_kernel(variant)->packed
                                       : variant                     ? variant->packed[node->op]
                                                                     : NULL;
    if (kernel)
        *kernel = found;
    return found ? (found->bytes(model, node) + 63) / 64 * 64 : 0;
}

size_t abste_packed_bytes(const abste_model *model, abste_isa isa, uint32_t int8) {
    const abste_variant *variant = abste_isa_name(isa) ? VARIANTS[isa] : NULL;
    uint64_t bytes = 0; /* nodes may share a blob: a file has less than all of them are packed */
    for (uint32_t i = 0; i < model->node_count; ++i)
        bytes += abste_node_packed_bytes(model, variant, int8, node_at(model, i), NULL);
    return bytes < SIZE_MAX ? (size_t)bytes : SIZE_MAX;
}

abste_status abste_pack(abste_model *model, abste_isa isa, uint32_t int8, void *memory, size_t bytes) {
    const size_t needed = abste_packed_bytes(model, isa, int8);
    if (!abste_has(isa) || bytes < needed || needed == SIZE_MAX || (needed && (!memory || (uintptr_t)memory % 64)))
        return ABSTE_ERROR_ARGUMENT;
    const abste_variant *variant = VARIANTS[isa];
    uint8_t *at = memory;
    model->scratch = 0;
    for (uint32_t i = 0; i < model->node_count; ++i) {
        const abste_node_record *node = node_at(model, i);
        const abste_packed_kernel *kernel;
        const size_t size = abste_node_packed_bytes(model, variant, int8, node, &kernel);
        if (abste_int8(model, int8, node)) {
            const uint32_t scratch = (uint32_t)abste_int8_scratch(model, node);
            model->scratch = scratch > model->scratch ? scratch : model->scratch;
        }
        if (size)
            kernel->pack(model, node, at);
        at += size;
    }
    model->packed = needed ? memory : NULL;
    model->variant = variant;
    model->int8 = int8;
    return ABSTE_OK;
}
