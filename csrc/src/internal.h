/* What the parts of the runtime share: how records of a file are read, and what a kernel is. docs/format.md has the layout. */
#ifndef ABSTE_INTERNAL_H
#define ABSTE_INTERNAL_H

#include "abste.h"

/* Instruction sets are chosen at run time, function by function: no file needs flags of its own. Microsoft's compiler cannot do
 * that, and clang in its place (clang-cl) leaves out the declarations of AVX-512 unless all files are compiled for it. */
#if !defined(ABSTE_SCALAR_ONLY) && defined(__x86_64__) && !defined(_MSC_VER) && (defined(__GNUC__) || defined(__clang__))
#define ABSTE_X86
#endif
#if !defined(ABSTE_SCALAR_ONLY) && defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define ABSTE_ARM
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "abste reads little-endian files in place and does not run on big-endian machines"
#endif

/* A file is read in place. Records lie at multiples of 4 bytes, which abste_load ensures. */
typedef struct {
    uint8_t kind, flags, rank, reserved0;
    uint32_t h, w, c, offset, name, reserved[2];
} abste_value_record;

typedef struct {
    uint8_t op, flags;
    int16_t pad_value;
    uint32_t name, in0, in1, out, bits, weight, groups;
    uint16_t kernel[2], stride[2], dilation[2], padding[4]; /* padding: top, left, bottom, right */
    uint32_t pad_channels[2], first_step, step_count;
    float fill;
    uint32_t reserved[6];
} abste_node_record;

typedef struct {
    uint8_t kind, reserved0[3];
    uint32_t name, a, b;
    float p, q;
    uint32_t reserved[2];
} abste_step_record;

typedef struct {
    uint32_t offset, bytes, type, count;
} abste_blob_record;

_Static_assert(sizeof(abste_value_record) == 32, "docs/format.md");
_Static_assert(sizeof(abste_node_record) == 96, "docs/format.md");
_Static_assert(sizeof(abste_step_record) == 32, "docs/format.md");
_Static_assert(sizeof(abste_blob_record) == 16, "docs/format.md");
_Static_assert(sizeof(float) == 4, "IEEE 754 binary32");

enum { OP_IDENTITY, OP_CONV, OP_SIGN_CONV, OP_XNOR, OP_MAX_POOL, OP_AVERAGE_POOL, OP_CONCAT, OP_PAD, OP_FLATTEN, OP_COUNT };
enum { BLOB_F32, BLOB_F16, BLOB_BITS, BLOB_I32, BLOB_TEXT };
enum {
    STEP_AFFINE,
    STEP_MULTIPLY,
    STEP_ADD,
    STEP_RELU,
    STEP_PRELU,
    STEP_CLAMP,
    STEP_GELU,
    STEP_GELU_TANH,
    STEP_SILU,
    STEP_SIGMOID,
    STEP_HARDSWISH,
    STEP_HARDSIGMOID,
    STEP_TANH,
    STEP_ADD_VALUE,
    STEP_MULTIPLY_VALUE,
    STEP_THRESHOLD,
    STEP_SIGN,
    STEP_COUNT
};
#define COUNT_PADDING 1u /* node flag */
#define IS_OUTPUT 1u     /* value flag */

/* The records come from memory that is aligned to 4 bytes, hence through void. */
static inline const abste_value_record *value_at(const abste_model *model, uint32_t i) {
    return (const abste_value_record *)(const void *)model->values + i;
}
static inline const abste_node_record *node_at(const abste_model *model, uint32_t i) {
    return (const abste_node_record *)(const void *)model->nodes + i;
}
static inline const abste_step_record *step_at(const abste_model *model, uint32_t i) {
    return (const abste_step_record *)(const void *)model->steps + i;
}
static inline const abste_blob_record *blob_at(const abste_model *model, uint32_t i) {
    return (const abste_blob_record *)(const void *)model->blobs + i;
}
static inline const void *blob_data(const abste_model *model, uint32_t i) { return model->data + blob_at(model, i)->offset; }
static inline uint32_t words_of(uint32_t channels) { return channels / 32 + (channels % 32 != 0); }
/* The value that tells the size of a node's output. */
static inline const abste_value_record *written_by(const abste_model *model, const abste_node_record *node) {
    return value_at(model, node->out != ABSTE_NONE ? node->out : node->bits);
}

/* Loops over registers: else gcc keeps arrays of them in memory. */
#if defined(__clang__)
#if __has_feature(undefined_behavior_sanitizer)
#define UNROLL /* with a check for each turn of a loop this takes clang minutes */
#else
#define UNROLL _Pragma("clang loop unroll(full)")
#endif
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

/* Channels that a kernel computes at once: a multiple of 32, so that bits leave in whole words. */
#define BLOCK 64u

typedef union {
    float f[BLOCK];
    int32_t i[BLOCK]; /* of xnor */
} abste_sums;

#define ROWS_AT_ONCE 4u /* that share what a kernel prepares */

typedef struct abste_job abste_job;

/* A step whose operands have been looked up: numbers of channel 0, and of a value those of pixel 0, `next` before those of the next. */
typedef struct {
    uint32_t kind;
    float p, q;
    const float *a, *b;
    size_t next;
} abste_step;

#define MOST_STEPS 16u /* nodes with more are left to the scalar code */

/* The sums of channels [o, o + n) of the output pixel (y, x); n is at most BLOCK. */
typedef void (*abste_kernel)(const abste_job *job, uint32_t y, uint32_t x, uint32_t o, uint32_t n, abste_sums *sums);

/* The same of a whole row of pixels, or of job->rows of them from y on, and their steps, to where the node writes. */
typedef void (*abste_row_kernel)(const abste_job *job, uint32_t y, uint32_t o, uint32_t n);

/* What a kernel reads, and where what it computes goes. */
struct abste_job {
    const abste_model *model;
    const abste_run_arguments *arguments;
    const abste_node_record *node;
    uint32_t H, W, C, h, w, c; /* of the input and the output */
    uint32_t in1_c;            /* of concat */
    uint32_t words;            /* of a pixel of a bits input */
    const float *in, *in1;
    const uint32_t *bits;
    const void *weight;
    int half;           /* the weight is f16 */
    const void *packed; /* the weight in the order of a variant, or NULL */
    abste_kernel kernel;
    abste_row_kernel row; /* instead of kernel, if not NULL */
    uint32_t rows;        /* that row computes at once: 1, or more of those that there are */
    uint32_t block;       /* channels that row or kernel takes at once: BLOCK, or a multiple of it, or all */
    void (*finish)(const abste_job *job, uint32_t y, uint32_t x, uint32_t pixels, uint32_t o, uint32_t n, abste_sums *sums);
    /* Of a node whose inputs are integers of eight bits: them, bytes of a row of them, what one of them is worth, what inputs are
     * multiplied with, and the largest of each row of inputs. */
    uint8_t *eight;
    size_t eight_row;
    float eight_scale, eight_times, *row_most;
    const abste_step *steps; /* those of the node, for all finishes but the scalar one */
    uint32_t number;         /* of the node */
    float *out;
    uint32_t *out_bits;
};

static inline const float *floats(const abste_job *job, uint32_t value) {
    return (const float *)(const void *)((const uint8_t *)job->arguments->arena + value_at(job->model, value)->offset);
}
/* What add_value and multiply_value take at a pixel: channel 0 of it. `step_to_next` further is that of the next one. */
static inline const float *operand_at(const abste_job *job, const abste_step_record *step, uint32_t y, uint32_t x,
                                      size_t *step_to_next) {
    const abste_value_record *value = value_at(job->model, step->a);
    *step_to_next = value->h == 1 && value->w == 1 ? 0 : job->c; /* 0: the same for every pixel */
    return floats(job, step->a) + ((size_t)y * job->w + x) * *step_to_next;
}

/* A kernel of an operation that wants the weight in an order of its own. */
typedef struct {
    /* Bytes of a node's weight in that order; 0 where the scalar kernel serves. */
    size_t (*bytes)(const abste_model *model, const abste_node_record *node);
    void (*pack)(const abste_model *model, const abste_node_record *node, void *memory);
    abste_row_kernel row;
    /* It prepares something from its inputs that serves many channels, and rows of outputs: it wants all channels at once, not BLOCK,
     * and ROWS_AT_ONCE rows. */
    int whole;
} abste_packed_kernel;

/* A kernel of convolutions with inputs of eight bits. */
typedef struct {
    abste_packed_kernel packed;
    void (*most)(const abste_job *job, uint32_t y);   /* finds the largest of a row of inputs: job->row_most[y] */
    void (*inputs)(const abste_job *job, uint32_t y); /* makes a row of integers: job->eight */
    abste_kernel kernel;                              /* where packed.row is NULL */
} abste_int8_kernel;

extern const abste_int8_kernel abste_int8_scalar;

/* Kernels for one instruction set. Where it has none for a node, the scalar ones serve. */
typedef struct {
    const abste_packed_kernel *packed[OP_COUNT];
    /* What reads the weight of a node where it is, or has none; NULL where there is no such kernel. */
    abste_row_kernel (*in_place)(const abste_model *model, const abste_node_record *node);
    const abste_int8_kernel *int8; /* or NULL */
    /* Sends the sums of neighbouring pixels, sums[0], sums[1]..., through job->steps, and stores what it writes.
     * Never called with traces, nor where there are more than MOST_STEPS. */
    void (*finish)(const abste_job *job, uint32_t y, uint32_t x, uint32_t pixels, uint32_t o, uint32_t n, abste_sums *sums);
} abste_variant;

/* Whether a node's inputs become integers of eight bits, if `which` are to; and the memory for them. */
int abste_int8(const abste_model *model, uint32_t which, const abste_node_record *node);
uint64_t abste_int8_scratch(const abste_model *model, const abste_node_record *node);
/* Kernels may read a little beyond the integers. */
static inline uint64_t abste_int8_rows_bytes(uint64_t integers) { return (integers + 64 + 63) / 64 * 64; }
/* What kernels share: a float weight of any type, the scale of an output channel's, and a float as an integer. */
float abste_weight(const abste_job *job, size_t at);
float abste_int8_scale(const abste_job *job, uint32_t o, float *times);
int8_t abste_int8_of(float number, float times);
float abste_from_half(uint16_t half);
static inline const abste_int8_kernel *int8_kernel(const abste_variant *variant) {
    return variant && variant->int8 ? variant->int8 : &abste_int8_scalar;
}
/* Bytes that a node's weight has in memory of abste_pack, a multiple of 64; `kernel`, if not NULL, receives what reads it there. */
size_t abste_node_packed_bytes(const abste_model *model, const abste_variant *variant, uint32_t int8, const abste_node_record *node,
                               const abste_packed_kernel **kernel);
/* The sizes and the weight of a node. */
abste_job abste_job_of(const abste_model *model, const abste_node_record *node);

#ifdef ABSTE_X86
extern const abste_variant abste_variant_avx2;
extern const abste_variant abste_variant_avx512;
#endif
#ifdef ABSTE_ARM
extern const abste_variant abste_variant_neon;
#endif

void abste_finish_scalar(const abste_job *job, uint32_t y, uint32_t x, uint32_t pixels, uint32_t o, uint32_t n, abste_sums *sums);
/* One step on channels [o, o + n) of the pixel (y, x). */
void abste_apply_scalar(const abste_job *job, const abste_step_record *step, uint32_t y, uint32_t x, uint32_t o, uint32_t n,
                        float *v);

void abste_identity_scalar(const abste_job *, uint32_t, uint32_t, uint32_t, uint32_t, abste_sums *);
void abste_conv_scalar(const abste_job *, uint32_t, uint32_t, uint32_t, uint32_t, abste_sums *);
void abste_sign_conv_scalar(const abste_job *, uint32_t, uint32_t, uint32_t, uint32_t, abste_sums *);
void abste_xnor_scalar(const abste_job *, uint32_t, uint32_t, uint32_t, uint32_t, abste_sums *);
void abste_max_pool_scalar(const abste_job *, uint32_t, uint32_t, uint32_t, uint32_t, abste_sums *);
void abste_average_pool_scalar(const abste_job *, uint32_t, uint32_t, uint32_t, uint32_t, abste_sums *);
void abste_concat_scalar(const abste_job *, uint32_t, uint32_t, uint32_t, uint32_t, abste_sums *);
void abste_pad_scalar(const abste_job *, uint32_t, uint32_t, uint32_t, uint32_t, abste_sums *);
void abste_flatten_scalar(const abste_job *, uint32_t, uint32_t, uint32_t, uint32_t, abste_sums *);

/* `count` (1 to 32) bits of a dense string, from bit `at` on; the rest is zero. Reads no word that holds none of them. */
static inline uint32_t bits_at(const uint32_t *string, uint64_t at, uint32_t count) {
    const uint32_t shift = at % 32;
    const uint32_t *word = string + at / 32;
    uint32_t bits = word[0] >> shift;
    if (shift + count > 32)
        bits |= word[1] << (32 - shift);
    return count == 32 ? bits : bits & ((1u << count) - 1);
}

/* The taps [first, last) of a window that lie inside [0, size), the first one being at `start`. */
typedef struct {
    uint32_t first, last;
} abste_range;

static inline abste_range taps_inside(int64_t start, uint32_t count, uint32_t dilation, uint32_t size) {
    abste_range range = {0, count};
    if (start < 0) {
        const int64_t skipped = (-start + dilation - 1) / dilation;
        range.first = skipped < count ? (uint32_t)skipped : count;
    }
    if (start + (int64_t)(count - 1) * dilation >= (int64_t)size) {
        const int64_t inside = start >= (int64_t)size ? 0 : ((int64_t)size - 1 - start) / dilation + 1;
        range.last = inside > range.first ? (uint32_t)inside : range.first;
    }
    return range;
}

float abste_pool_divisor(const abste_job *job, int64_t row, int64_t column, abste_range i, abste_range j);

/* How many pixels in a row, at most `most`, have the same taps inside as the first, whose tap 0 lies at `column` and whose taps `js`
 * are inside: all that have every tap inside, or the first alone. */
static inline uint32_t pixels_alike(const abste_job *job, int64_t column, abste_range js, uint32_t most) {
    const abste_node_record *node = job->node;
    if (js.first != 0 || js.last != node->kernel[1])
        return 1;
    const int64_t reach = (int64_t)(node->kernel[1] - 1) * node->dilation[1];
    const uint32_t alike = (uint32_t)(((int64_t)job->W - 1 - reach - column) / node->stride[1]) + 1;
    return alike < most ? alike : most;
}

#endif
