/* abste: runs .abste files (docs/format.md). C11; needs memcpy and nothing else. No allocation, no globals.
 *
 *     abste_model model;
 *     if (abste_load(&model, file, file_bytes, 0, NULL) == ABSTE_OK) {
 *         // an arena of abste_arena_bytes(&model) bytes, aligned to 64
 *         abste_run_arguments run = {.arena = arena, .arena_bytes = sizeof arena, .inputs = &image, .outputs = &logits};
 *         abste_run(&model, &run);
 *     }
 *
 * A model is read only and may serve several threads, each with an arena of its own. Copyright abste's authors, Apache-2.0.
 */
#ifndef ABSTE_H
#define ABSTE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(ABSTE_SHARED) && defined(_WIN32)
#define ABSTE_API __declspec(dllexport)
#elif defined(ABSTE_SHARED)
#define ABSTE_API __attribute__((visibility("default")))
#else
#define ABSTE_API
#endif

#define ABSTE_NONE 0xFFFFFFFFu

typedef enum {
    ABSTE_OK = 0,
    ABSTE_ERROR_ARGUMENT,  /* a null pointer, or data or an arena that is not aligned (4 and 64 bytes) */
    ABSTE_ERROR_MAGIC,     /* not an .abste file */
    ABSTE_ERROR_VERSION,   /* made for a newer reader */
    ABSTE_ERROR_TRUNCATED, /* shorter or longer than its header says */
    ABSTE_ERROR_CHECKSUM,  /* damaged */
    ABSTE_ERROR_HEADER,    /* counts or offsets that cannot be */
    ABSTE_ERROR_VALUE,     /* a value is malformed, or lies outside the arena */
    ABSTE_ERROR_NODE,      /* a node is malformed, or its sizes disagree */
    ABSTE_ERROR_STEP,      /* a step is malformed, or its operands do not fit */
    ABSTE_ERROR_BLOB,      /* a blob is malformed, or does not fit its use */
    ABSTE_ERROR_STRING,    /* a name lies outside the strings */
    ABSTE_ERROR_ORDER,     /* a value is read before it is written, written twice or never */
    ABSTE_ERROR_OVERLAP,   /* values that live at the same time overlap in the arena */
    ABSTE_ERROR_ARENA,     /* abste_run: the arena is too small */
    ABSTE_ERROR_TRACE      /* abste_run: a trace of a node or step that does not exist */
} abste_status;

typedef enum { ABSTE_FLOAT = 0, ABSTE_BITS = 1 } abste_kind;
typedef enum { ABSTE_NCHW = 0, ABSTE_NHWC = 1 } abste_layout;

/* For abste_load: do not compare the checksum. For fuzzing, and for media that check by themselves. */
#define ABSTE_SKIP_CHECKSUM 1u

/* A loaded model: where things stand in the caller's data. Fill it with abste_load; the members are private. */
typedef struct {
    const uint8_t *data;
    uint32_t bytes, arena_bytes;
    uint32_t value_count, node_count, step_count, blob_count, string_bytes, input_count, output_count;
    uint32_t normalization, classes, metadata;
    const uint8_t *values, *nodes, *steps, *blobs, *strings;
    const uint8_t *packed; /* see abste_pack */
    const void *variant;
    uint32_t int8, scratch;
} abste_model;

/* Check a whole file and set up `model`, which keeps pointing into `data` (aligned to 4 bytes; 64 is faster).
 * Returns ABSTE_OK, or the first thing found wrong; `model` is then not to be used. If `where` is not NULL, it receives the
 * index of the value, node, step or blob at fault, or ABSTE_NONE. */
ABSTE_API abste_status abste_load(abste_model *model, const void *data, size_t bytes, uint32_t flags, uint32_t *where);

/* One sentence in English for a status. */
ABSTE_API const char *abste_message(abste_status status);

/* Bytes of the arena that abste_run needs. */
ABSTE_API size_t abste_arena_bytes(const abste_model *model);

/* Instruction sets, a faster one behind a slower one. Each computes the same bits as the scalar code; which there are on a machine
 * is found out when asked. */
typedef enum {
    ABSTE_SCALAR = 0,
    ABSTE_NEON,   /* 64-bit ARM: every such machine */
    ABSTE_AVX2,   /* Intel from Haswell, AMD from Zen */
    ABSTE_AVX512, /* with VPOPCNTDQ and VNNI: Intel from Ice Lake, AMD from Zen 4 */
    ABSTE_ISA_COUNT
} abste_isa;

/* Whether this machine, and this build, has it. */
ABSTE_API int abste_has(abste_isa isa);
/* The fastest that it has. */
ABSTE_API abste_isa abste_fastest(void);
/* "scalar", "neon", "avx2", "avx512"; NULL for a number that is none. */
ABSTE_API const char *abste_isa_name(abste_isa isa);

/* Layers whose inputs, and float weights, may become integers of eight bits: faster, and no longer exact. The inputs of a layer share
 * the scale of the image's largest, float weights have one per output channel; what comes out is the same bits on every instruction
 * set. Convolutions with groups, and those of more than 2^17 terms, stay as they are. */
#define ABSTE_INT8_BINARY 1u /* sign_conv: binary weights and float inputs */
#define ABSTE_INT8_STEM 2u   /* conv that reads an input of the network */
#define ABSTE_INT8_FLOAT 4u  /* every other conv */
/* Whether an instruction set has kernels of its own for these; the scalar ones, which serve then, are slower than the exact layer. */
ABSTE_API int abste_has_int8(abste_isa isa);

/* A freshly loaded model runs the scalar code and reads its weights where they are. The kernels of an instruction set want them
 * in an order of their own: abste_pack writes them once into memory of the caller's, of abste_packed_bytes bytes and aligned to
 * 64, which the model keeps pointing into. `int8` adds up ABSTE_INT8_..., or is 0. Call it before any thread runs the model, and ask
 * for abste_arena_bytes after it. Returns ABSTE_OK, or ABSTE_ERROR_ARGUMENT for an instruction set that the machine lacks or memory
 * that is missing, too small or not aligned. */
ABSTE_API size_t abste_packed_bytes(const abste_model *model, abste_isa isa, uint32_t int8);
ABSTE_API abste_status abste_pack(abste_model *model, abste_isa isa, uint32_t int8, void *memory, size_t bytes);

/* A tensor of the network, for one image. `rank` is PyTorch's without the batch: 1 (c), 2 (c, w), 3 (c, h, w). */
typedef struct {
    const char *name;
    abste_kind kind;
    uint32_t rank, h, w, c;
    int is_output;
} abste_value_info;

/* A node: the module it came from, the operation, and sizes. `weight_bits` is 1, 16, 32 or 0; `weight_count` counts weights;
 * `input_bits` is 1 or 32, or 8 after an abste_pack that said so; `macs` are multiply-accumulates for one image, padding included;
 * `work` are those, or the numbers that a window of a pool reads, or the numbers written: a measure of how long it takes. `out` is the
 * value it writes (its float one if both). */
typedef struct {
    const char *name, *operation;
    uint32_t out, step_count, weight_bits, weight_count, input_bits;
    uint64_t macs, work;
} abste_node_info;

ABSTE_API uint32_t abste_input_count(const abste_model *model);
ABSTE_API uint32_t abste_output_count(const abste_model *model);
ABSTE_API uint32_t abste_value_count(const abste_model *model);
ABSTE_API uint32_t abste_node_count(const abste_model *model);
/* Index of the value that is output `i`; of inputs, i is the index itself. ABSTE_NONE where there is none. */
ABSTE_API uint32_t abste_output(const abste_model *model, uint32_t i);
/* These return 0, or -1 for an index that does not exist. */
ABSTE_API int abste_value(const abste_model *model, uint32_t i, abste_value_info *info);
ABSTE_API int abste_node(const abste_model *model, uint32_t i, abste_node_info *info);
/* Name of a step of a node, or NULL where there is no such step; and its kind, numbered as in docs/format.md, or -1. */
ABSTE_API const char *abste_step_name(const abste_model *model, uint32_t node, uint32_t step);
ABSTE_API int abste_step_kind(const abste_model *model, uint32_t node, uint32_t step);
/* Mean and standard deviation per channel of input 0 (2 c numbers), the class names (each ended by a zero byte) and the JSON
 * text, with their sizes in bytes; NULL where the file has none. */
ABSTE_API const float *abste_normalization(const abste_model *model);
ABSTE_API const char *abste_classes(const abste_model *model, size_t *bytes);
ABSTE_API const char *abste_metadata(const abste_model *model, size_t *bytes);

/* Runs task(argument, begin, end) over parts of [0, count), and returns when all are done. Parts may run at the same time. */
typedef void (*abste_task)(void *argument, uint32_t begin, uint32_t end);
typedef void (*abste_parallel_for)(void *pool, uint32_t count, abste_task task, void *argument);

/* Copies what a node computes to `buffer`, h * w * c numbers in NHWC order: at `point` -1 its sums (int32_t for an `xnor`
 * node, else float), at point i what stands after its step i (float). */
typedef struct {
    uint32_t node;
    int32_t point;
    void *buffer;
} abste_trace;

/* Told how far a run is, in the thread that called abste_run: with ABSTE_NONE when the inputs stand in the arena, then with the
 * index of each node that is done. For measuring: the runtime has no clock, its caller has. */
typedef void (*abste_progress)(void *observer, uint32_t node);

typedef struct {
    void *arena; /* aligned to 64 bytes */
    size_t arena_bytes;
    const float *const *inputs; /* one pointer per input: one image */
    float *const *outputs;      /* one pointer per output: one image; NULL where it is not wanted */
    abste_layout layout;        /* of inputs and outputs; says nothing where rank is 1 */
    abste_parallel_for parallel_for; /* NULL: one thread */
    void *pool;
    const abste_trace *traces;
    uint32_t trace_count;
    abste_progress progress; /* NULL: nobody is told */
    void *observer;
} abste_run_arguments;

/* Run the network on one image. */
ABSTE_API abste_status abste_run(const abste_model *model, const abste_run_arguments *arguments);

#ifdef __cplusplus
}
#endif
#endif
