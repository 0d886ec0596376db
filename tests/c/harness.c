/* Loads and runs files under the sanitizers. For each: a line with the status, the place at fault and the message; for one
 * that loads, what abste_run says of it, of too small an arena and of an unaligned one, its outputs as hexadecimal words (NaN always as
 * the same), and for each instruction set of the machine whether its kernels give the same, and its caller is told of every node in
 * order.
 *
 *     harness [--skip-checksum] [--images] FILE...
 *
 * With --images, an image follows each file: its inputs, one behind the other, as raw numbers. Else it is made up, and a file that asks
 * for much work is not run.
 */
#include "abste.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_ARENA (1u << 24)
#define MOST_WORK 20000000u

/* A file in memory of just its size, so that a read beyond it is seen. */
static uint8_t *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file)
        exit(2);
    uint8_t *data = NULL;
    size_t room = *size = 0;
    for (;;) {
        if (*size == room)
            data = realloc(data, room = 2 * room + 4096);
        const size_t got = fread(data + *size, 1, room - *size, file);
        if (!got)
            break;
        *size += got;
    }
    fclose(file);
    return realloc(data, *size ? *size : 1);
}

static size_t numbers(const abste_model *model, uint32_t value) {
    abste_value_info info;
    return abste_value(model, value, &info) ? 0 : (size_t)info.h * info.w * info.c;
}

static uint64_t work(const abste_model *model) {
    uint64_t sum = 0;
    abste_node_info node;
    for (uint32_t i = 0; abste_node(model, i, &node) == 0; ++i)
        sum += node.work < MOST_WORK ? node.work : MOST_WORK;
    return sum;
}

static int same(float a, float b) { return memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b); }

/* Counts what it is told, as long as that comes in order: ABSTE_NONE + 1 is 0. */
static void count(void *observer, uint32_t node) {
    uint32_t *next = observer;
    *next += node + 1 == *next;
}

/* Runs with the kernels of an instruction set, with memory of just the size they ask for; says whether all went well. */
static int run_with(abste_isa isa, uint32_t int8, abste_model model, abste_run_arguments arguments, float **outputs) {
    const size_t bytes = abste_packed_bytes(&model, isa, int8);
    void *packed = aligned_alloc(64, bytes ? bytes : 64);
    int well = bytes == 0 || abste_pack(&model, isa, int8, packed, bytes - 1) == ABSTE_ERROR_ARGUMENT;
    well = well && abste_pack(&model, isa, int8, packed, bytes) == ABSTE_OK;
    const size_t arena_bytes = abste_arena_bytes(&model);
    arguments.arena = aligned_alloc(64, arena_bytes ? arena_bytes : 64);
    arguments.arena_bytes = arena_bytes;
    arguments.outputs = outputs;
    uint32_t told = 0;
    arguments.progress = count;
    arguments.observer = &told;
    well = well && abste_run(&model, &arguments) == ABSTE_OK && told == abste_node_count(&model) + 1;
    free(arguments.arena);
    free(packed);
    return well;
}

/* In halves, the second one first. */
static void in_halves(void *pool, uint32_t count, abste_task task, void *argument) {
    (void)pool;
    task(argument, count / 2, count);
    task(argument, 0, count / 2);
}

/* Every instruction set against the scalar code, whose outputs are `wanted`; work is shared out. */
static void compare(uint32_t int8, const abste_model *model, abste_run_arguments arguments, float *const *wanted) {
    const uint32_t outs = abste_output_count(model);
    float **outputs = calloc(2 * outs, sizeof *outputs);
    for (uint32_t i = 0; i < 2 * outs; ++i)
        outputs[i] = malloc(numbers(model, abste_output(model, i % outs)) * sizeof(float));
    if (int8) {
        if (!run_with(ABSTE_SCALAR, int8, *model, arguments, outputs + outs))
            printf("scalar int8 FAILED\n");
        wanted = outputs + outs;
    }
    arguments.parallel_for = in_halves;
    for (int isa = 0; abste_isa_name((abste_isa)isa); ++isa) {
        if (!abste_has((abste_isa)isa))
            continue;
        int equal = run_with((abste_isa)isa, int8, *model, arguments, outputs);
        for (uint32_t i = 0; i < outs && equal; ++i)
            for (size_t k = 0, count = numbers(model, abste_output(model, i)); k < count; ++k)
                equal = equal && same(outputs[i][k], wanted[i][k]);
        printf("%s%s %s\n", abste_isa_name((abste_isa)isa), int8 ? " int8" : "", equal ? "same" : "DIFFERENT");
    }
    for (uint32_t i = 0; i < 2 * outs; ++i)
        free(outputs[i]);
    free(outputs);
}

static void run(const abste_model *model, const float *image) {
    const uint32_t ins = abste_input_count(model), outs = abste_output_count(model);
    float **buffers = calloc(ins + outs, sizeof *buffers);
    for (uint32_t i = 0; i < ins + outs; ++i) {
        const size_t count = numbers(model, i < ins ? i : abste_output(model, i - ins));
        buffers[i] = malloc(count * sizeof(float));
        for (size_t k = 0; k < count; ++k)
            buffers[i][k] = image && i < ins ? *image++ : (float)((int)(k * 2654435761u % 1000) - 500) / 128.0f;
    }
    const size_t bytes = abste_arena_bytes(model);
    void *arena = aligned_alloc(64, bytes + 64);
    abste_run_arguments arguments = {.arena = arena, .arena_bytes = bytes, .inputs = (const float *const *)buffers,
                                     .outputs = buffers + ins, .layout = ABSTE_NHWC};
    printf("run %d\n", (int)abste_run(model, &arguments));
    arguments.arena_bytes = bytes - 1;
    printf("small %d\n", (int)abste_run(model, &arguments));
    arguments.arena_bytes = bytes;
    arguments.arena = (char *)arena + 4;
    printf("unaligned %d\n", (int)abste_run(model, &arguments));
    for (uint32_t i = 0; i < outs; ++i)
        for (size_t k = 0, count = numbers(model, abste_output(model, i)); k < count; ++k) {
            uint32_t word;
            memcpy(&word, &buffers[ins + i][k], sizeof word);
            word = buffers[ins + i][k] == buffers[ins + i][k] ? word : 0x7FC00000u; /* processors differ in its sign */
            printf("%08x%c", word, k + 1 < count ? ' ' : '\n');
        }
    arguments.arena = arena;
    compare(0, model, arguments, buffers + ins);
    compare(ABSTE_INT8_BINARY | ABSTE_INT8_STEM | ABSTE_INT8_FLOAT, model, arguments, buffers + ins);
    for (uint32_t i = 0; i < ins + outs; ++i)
        free(buffers[i]);
    free(buffers);
    free(arena);
}

int main(int argc, char **argv) {
    uint32_t flags = 0;
    int images = 0;
    for (int i = 1; i < argc; ++i) {
        if (!strcmp(argv[i], "--skip-checksum")) {
            flags = ABSTE_SKIP_CHECKSUM;
            continue;
        }
        if (!strcmp(argv[i], "--images")) {
            images = 1;
            continue;
        }
        size_t size, image_size = 0, wanted = 0;
        uint8_t *data = read_file(argv[i], &size);
        abste_model model;
        uint32_t where;
        const abste_status status = abste_load(&model, data, size, flags, &where);
        printf("status %d %u %s\n", (int)status, (unsigned)where, abste_message(status));
        uint8_t *image = images && i + 1 < argc ? read_file(argv[++i], &image_size) : NULL;
        for (uint32_t v = 0; status == ABSTE_OK && v < abste_input_count(&model); ++v)
            wanted += numbers(&model, v) * sizeof(float);
        if (images && (!image || (status == ABSTE_OK && image_size != wanted)))
            return 2;
        if (status == ABSTE_OK && (image || (abste_arena_bytes(&model) <= MOST_ARENA && work(&model) <= MOST_WORK)))
            run(&model, (const float *)(const void *)image);
        free(image);
        free(data);
    }
    return 0;
}
