/* libFuzzer target: loads any bytes with the checksum skipped, and runs what loads. Sanitizers say whether that is safe. */
#include "abste.h"

#include <stdlib.h>
#include <string.h>

#define MOST_ARENA (1u << 18)
#define MOST_PACKED (1u << 24)
#define MOST_WORK 4000000u /* a file may ask for hours of honest work */

/* In halves, the second one first. */
static void in_halves(void *pool, uint32_t count, abste_task task, void *argument) {
    (void)pool;
    task(argument, count / 2, count);
    task(argument, 0, count / 2);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    /* A copy of its own size, aligned: a read beyond it is then seen. The size in the header is made right, or hardly any
     * mutation would get further. */
    uint8_t *file = aligned_alloc(64, size ? (size + 63) / 64 * 64 : 64);
    memcpy(file, data, size);
    if (size >= 16) {
        const uint32_t bytes = (uint32_t)size;
        memcpy(file + 12, &bytes, sizeof bytes);
    }
    abste_model model;
    uint32_t where;
    uint64_t work = 0;
    if (!abste_message(abste_load(&model, file, size, 0, &where)))
        abort();
    if (abste_load(&model, file, size, ABSTE_SKIP_CHECKSUM, &where) == ABSTE_OK && abste_arena_bytes(&model) <= MOST_ARENA) {
        abste_value_info value;
        abste_node_info node;
        abste_trace traces[3] = {{0, -1, NULL}, {0, 0, NULL}, {0, 1, NULL}};
        const float *inputs[64];
        float *outputs[64];
        uint32_t most = 0, count = 0;
        size_t bytes;
        for (uint32_t i = 0; i < abste_value_count(&model) && abste_value(&model, i, &value) == 0; ++i)
            most = value.h * value.w * value.c > most ? value.h * value.w * value.c : most;
        for (uint32_t i = 0; abste_node(&model, i, &node) == 0; ++i) {
            work += node.work;
            for (uint32_t step = 0; abste_step_name(&model, i, step); ++step)
                work += strlen(abste_step_name(&model, i, step)) > size;
        }
        if (abste_output(&model, 0) >= abste_value_count(&model))
            abort(); /* there is one at least */
        abste_normalization(&model);
        abste_classes(&model, &bytes);
        abste_metadata(&model, &bytes);
        float *numbers = malloc((size_t)(most + 1) * sizeof(float) * 3), *in = numbers + most, *out = in + most;
        void *arena = aligned_alloc(64, abste_arena_bytes(&model) ? abste_arena_bytes(&model) : 64);
        for (uint32_t k = 0; k < most; ++k)
            in[k] = (float)(k % 7) - 3.0f;
        for (int k = 0; k < 64; ++k)
            inputs[k] = in, outputs[k] = out;
        for (int k = 0; k < 3; ++k)
            traces[k].buffer = numbers;
        if (abste_node_count(&model) && abste_step_name(&model, 0, 0))
            count = abste_step_name(&model, 0, 1) ? 3 : 2;
        else if (abste_node_count(&model))
            count = 1;
        if (work < MOST_WORK && abste_input_count(&model) <= 64 && abste_output_count(&model) <= 64) {
            abste_run_arguments run = {.arena = arena, .arena_bytes = abste_arena_bytes(&model), .inputs = inputs,
                                       .outputs = outputs, .layout = size % 2 ? ABSTE_NHWC : ABSTE_NCHW, .traces = traces,
                                       .trace_count = count, .parallel_for = size % 3 ? NULL : in_halves};
            if (abste_run(&model, &run) != ABSTE_OK)
                abort();
            /* With every instruction set; without traces, which the kernels leave to the scalar code. */
            run.trace_count = 0;
            for (uint32_t k = 0; abste_isa_name((abste_isa)(k / 2)); ++k) {
                const abste_isa isa = (abste_isa)(k / 2);
                const uint32_t int8 = k % 2 ? ABSTE_INT8_BINARY | ABSTE_INT8_STEM | ABSTE_INT8_FLOAT : 0;
                const size_t packed_bytes = abste_packed_bytes(&model, isa, int8);
                if (!abste_has(isa) || packed_bytes > MOST_PACKED)
                    continue;
                void *packed = aligned_alloc(64, packed_bytes ? packed_bytes : 64);
                if (abste_pack(&model, isa, int8, packed, packed_bytes) != ABSTE_OK)
                    abort();
                const size_t arena_bytes = abste_arena_bytes(&model);
                if (arena_bytes <= MOST_ARENA) {
                    run.arena = aligned_alloc(64, arena_bytes ? arena_bytes : 64);
                    run.arena_bytes = arena_bytes;
                    if (abste_run(&model, &run) != ABSTE_OK)
                        abort();
                    free(run.arena);
                }
                free(packed);
            }
        }
        free(arena);
        free(numbers);
    }
    free(file);
    return 0;
}
