/* Which instruction sets the machine has, and the weights in the order that their kernels want. */
#include "internal.h"

#ifdef ABSTE_X86
#include <cpuid.h>

static int has_avx512(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return 0;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0xE6) != 0xE6) /* the system saves the registers */
        return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    const unsigned needed = bit_BMI2 | bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    return (b & needed) == needed && (c & bit_AVX512VPOPCNTDQ);
}
#endif

static const abste_variant *const VARIANTS[ABSTE_ISA_COUNT] = {
#ifdef ABSTE_X86
    [ABSTE_AVX512] = &abste_variant_avx512,
#else
    NULL
#endif
};

int abste_has(abste_isa isa) {
    switch (isa) {
    case ABSTE_SCALAR:
        return 1;
#ifdef ABSTE_X86
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
    static const char *const names[ABSTE_ISA_COUNT] = {"scalar", "avx512"};
    return (unsigned)isa < ABSTE_ISA_COUNT ? names[isa] : NULL;
}

size_t abste_packed_bytes(const abste_model *model, abste_isa isa) {
    const abste_variant *variant = abste_isa_name(isa) ? VARIANTS[isa] : NULL;
    size_t bytes = 0;
    for (uint32_t i = 0; variant && i < model->node_count; ++i)
        bytes += variant->packed_bytes(model, node_at(model, i));
    return bytes;
}

abste_status abste_pack(abste_model *model, abste_isa isa, void *memory, size_t bytes) {
    const size_t needed = abste_packed_bytes(model, isa);
    if (!abste_has(isa) || bytes < needed || (needed && (!memory || (uintptr_t)memory % 64)))
        return ABSTE_ERROR_ARGUMENT;
    const abste_variant *variant = VARIANTS[isa];
    uint8_t *at = memory;
    for (uint32_t i = 0; variant && i < model->node_count; ++i) {
        const size_t size = variant->packed_bytes(model, node_at(model, i));
        if (size)
            variant->pack(model, node_at(model, i), at);
        at += size;
    }
    model->packed = needed ? memory : NULL;
    model->variant = variant;
    return ABSTE_OK;
}
