/* The reader: checks every rule of docs/format.md before anything runs. It trusts nothing in the file. */
#include "internal.h"

#include <string.h>

#define MAX_VALUES 4096u
#define MAX_NODES 4096u
#define MAX_STEPS 16384u
#define MAX_BLOBS 16384u
#define HEADER_BYTES 64u
#define CHECKSUM_AT 16u

static const uint8_t MAGIC[8] = {0x89, 'A', 'B', 'S', 'T', 'E', '\r', '\n'};

static uint32_t header_u32(const uint8_t *data, uint32_t at) {
    uint32_t number;
    memcpy(&number, data + at, sizeof number);
    return number;
}

static uint64_t up(uint64_t size) { return (size + 63) / 64 * 64; }

/* CRC-32 by nibbles: a table of 16 words is small enough for a microcontroller. */
static uint32_t crc(uint32_t state, const uint8_t *data, size_t bytes) {
    static const uint32_t table[16] = {0x00000000, 0x1DB71064, 0x3B6E20C8, 0x26D930AC, 0x76DC4190, 0x6B6B51F4,
                                       0x4DB26158, 0x5005713C, 0xEDB88320, 0xF00F9344, 0xD6D6A3E8, 0xCB61B38C,
                                       0x9B64C2B0, 0x86D3D2D4, 0xA00AE278, 0xBDBDF21C};
    for (size_t i = 0; i < bytes; ++i) {
        state ^= data[i];
        state = table[state & 15] ^ (state >> 4);
        state = table[state & 15] ^ (state >> 4);
    }
    return state;
}

static uint32_t checksum(const uint8_t *data, size_t bytes) {
    static const uint8_t zero[4] = {0};
    uint32_t state = crc(0xFFFFFFFFu, data, CHECKSUM_AT);
    state = crc(state, zero, 4);
    return ~crc(state, data + CHECKSUM_AT + 4, bytes - CHECKSUM_AT - 4);
}

static int is_zero(float number) {
    uint32_t pattern;
    memcpy(&pattern, &number, sizeof pattern);
    return pattern == 0;
}

/* Sections, strings and blobs. */
static abste_status check_layout(abste_model *model, uint32_t *where) {
    const uint64_t records[4] = {32ull * model->value_count, 96ull * model->node_count, 32ull * model->step_count,
                                 16ull * model->blob_count};
    const uint8_t **sections[4] = {&model->values, &model->nodes, &model->steps, &model->blobs};
    uint64_t at = HEADER_BYTES;
    for (int i = 0; i < 4; ++i) {
        *sections[i] = model->data + at;
        at += up(records[i]);
        if (at > model->bytes)
            return ABSTE_ERROR_HEADER;
    }
    model->strings = model->data + at;
    if (at + model->string_bytes > model->bytes || model->string_bytes == 0)
        return ABSTE_ERROR_HEADER;
    if (model->strings[0] != 0 || model->strings[model->string_bytes - 1] != 0)
        return ABSTE_ERROR_STRING;
    at += up(model->string_bytes);
    for (uint32_t i = 0; i < model->blob_count; ++i) {
        static const uint8_t sizes[5] = {4, 2, 0, 4, 1};
        const abste_blob_record *blob = blob_at(model, i);
        *where = i;
        if (blob->type > BLOB_TEXT || blob->offset != at)
            return ABSTE_ERROR_BLOB;
        const uint64_t bytes =
            blob->type == BLOB_BITS ? ((uint64_t)blob->count + 7) / 8 : (uint64_t)blob->count * sizes[blob->type];
        if (bytes != blob->bytes || at + bytes > model->bytes)
            return ABSTE_ERROR_BLOB;
        at += up(bytes);
    }
    *where = ABSTE_NONE;
    return at == model->bytes ? ABSTE_OK : ABSTE_ERROR_TRUNCATED;
}

static int is_blob(const abste_model *model, uint32_t i, uint32_t type, uint64_t count) {
    return i < model->blob_count && blob_at(model, i)->type == type && blob_at(model, i)->count == count;
}

static uint64_t bytes_of(const abste_value_record *value) {
    return 4ull * value->h * value->w * (value->kind == ABSTE_BITS ? words_of(value->c) : value->c);
}

static abste_status check_value(const abste_model *model, uint32_t i) {
    const abste_value_record *value = value_at(model, i);
    if (value->kind > ABSTE_BITS || value->flags > IS_OUTPUT || value->reserved0 || value->reserved[0] || value->reserved[1])
        return ABSTE_ERROR_VALUE;
    if (value->kind == ABSTE_BITS && (value->flags || i < model->input_count))
        return ABSTE_ERROR_VALUE;
    if (value->h - 1 > 65534 || value->w - 1 > 65534 || value->c - 1 > (1u << 24) - 1)
        return ABSTE_ERROR_VALUE;
    if (value->rank < 1 || value->rank > 3 || (value->rank < 3 && value->h != 1) || (value->rank < 2 && value->w != 1))
        return ABSTE_ERROR_VALUE;
    if (value->offset % 64 || value->offset + bytes_of(value) > model->arena_bytes)
        return ABSTE_ERROR_VALUE;
    return value->name < model->string_bytes ? ABSTE_OK : ABSTE_ERROR_STRING;
}

static int same_size(const abste_value_record *a, const abste_value_record *b) {
    return a->h == b->h && a->w == b->w && a->c == b->c;
}

/* Does a window that slides over `size` give `count` positions? Pooling may round up (ceil_mode). */
static int window_fits(uint32_t size, uint32_t count, uint32_t kernel, uint32_t stride, uint32_t dilation, uint32_t before,
                       uint32_t after, int pool) {
    const int64_t extent = (int64_t)dilation * (kernel - 1) + 1;
    const int64_t room = (int64_t)size + before + after - extent;
    if (pool && (before >= extent || after >= extent))
        return 0;
    if (!pool)
        return room >= 0 && (int64_t)count == room / stride + 1;
    if ((int64_t)(count - 1) * stride - before >= (int64_t)size) /* the last window would lie in the padding behind */
        return 0;
    const int64_t up = room + stride - 1; /* at least 0 wherever one window fits, if only in part */
    return (room >= 0 && (int64_t)count == room / stride + 1) || (up >= 0 && (int64_t)count == up / stride + 1);
}

static abste_status check_step(const abste_model *model, const abste_node_record *node, uint32_t written, uint32_t i) {
    const abste_step_record *step = step_at(model, i);
    const abste_value_record *out = written_by(model, node);
    if (step->kind >= STEP_COUNT || step->reserved0[0] || step->reserved0[1] || step->reserved0[2] || step->reserved[0] ||
        step->reserved[1])
        return ABSTE_ERROR_STEP;
    if (step->name >= model->string_bytes)
        return ABSTE_ERROR_STRING;
    if (step->kind == STEP_CLAMP ? !(step->p <= step->q) : !is_zero(step->p) || !is_zero(step->q))
        return ABSTE_ERROR_STEP;
    if (step->kind == STEP_AFFINE ? !is_blob(model, step->b, BLOB_F32, out->c) : step->b != ABSTE_NONE)
        return ABSTE_ERROR_STEP;
    switch (step->kind) {
    case STEP_AFFINE:
    case STEP_MULTIPLY:
    case STEP_ADD:
    case STEP_PRELU:
        return is_blob(model, step->a, BLOB_F32, out->c) ? ABSTE_OK : ABSTE_ERROR_STEP;
    case STEP_ADD_VALUE:
    case STEP_MULTIPLY_VALUE: {
        if (step->a >= model->value_count)
            return ABSTE_ERROR_STEP;
        if (step->a >= written)
            return ABSTE_ERROR_ORDER;
        const abste_value_record *value = value_at(model, step->a);
        const int fits = same_size(value, out) || (value->h == 1 && value->w == 1 && value->c == out->c);
        return value->kind == ABSTE_FLOAT && fits ? ABSTE_OK : ABSTE_ERROR_STEP;
    }
    case STEP_THRESHOLD: {
        if (node->op != OP_XNOR || node->step_count != 1 || node->out != ABSTE_NONE ||
            !is_blob(model, step->a, BLOB_I32, 2ull * out->c))
            return ABSTE_ERROR_STEP;
        const int32_t *pairs = blob_data(model, step->a);
        for (uint32_t o = 0; o < out->c; ++o)
            if (pairs[2 * o + 1] != 1 && pairs[2 * o + 1] != -1)
                return ABSTE_ERROR_STEP;
        return ABSTE_OK;
    }
    default:
        return step->a == ABSTE_NONE ? ABSTE_OK : ABSTE_ERROR_STEP;
    }
}

static abste_status check_sizes(const abste_model *model, const abste_node_record *node) {
    const abste_value_record *in = value_at(model, node->in0), *out = written_by(model, node);
    const uint16_t *pad = node->padding;
    const int convolves = node->op == OP_CONV || node->op == OP_SIGN_CONV || node->op == OP_XNOR;
    const int pools = node->op == OP_MAX_POOL || node->op == OP_AVERAGE_POOL;
    const int slides = convolves || pools, pads = node->op == OP_PAD;
    for (int i = 0; i < 2; ++i) {
        if (!node->kernel[i] || !node->stride[i] || !node->dilation[i])
            return ABSTE_ERROR_NODE;
        if (!slides && (node->kernel[i] != 1 || node->stride[i] != 1 || node->dilation[i] != 1))
            return ABSTE_ERROR_NODE;
        if (node->op == OP_AVERAGE_POOL && node->dilation[i] != 1)
            return ABSTE_ERROR_NODE;
    }
    if (!slides && !pads && (pad[0] || pad[1] || pad[2] || pad[3]))
        return ABSTE_ERROR_NODE;
    if (!pads && (node->pad_channels[0] || node->pad_channels[1] || !is_zero(node->fill)))
        return ABSTE_ERROR_NODE;
    if (node->groups == 0 || (!convolves && node->groups != 1))
        return ABSTE_ERROR_NODE;
    if (slides && (!window_fits(in->h, out->h, node->kernel[0], node->stride[0], node->dilation[0], pad[0], pad[2], pools) ||
                   !window_fits(in->w, out->w, node->kernel[1], node->stride[1], node->dilation[1], pad[1], pad[3], pools)))
        return ABSTE_ERROR_NODE;
    if (convolves) {
        if (in->c % node->groups || out->c % node->groups)
            return ABSTE_ERROR_NODE;
        const uint64_t taps = (uint64_t)node->kernel[0] * node->kernel[1] * (in->c / node->groups);
        if (taps > 1u << 24)
            return ABSTE_ERROR_NODE;
        const uint64_t count = taps * out->c;
        if (node->op != OP_CONV)
            return is_blob(model, node->weight, BLOB_BITS, count) ? ABSTE_OK : ABSTE_ERROR_BLOB;
        return is_blob(model, node->weight, BLOB_F32, count) || is_blob(model, node->weight, BLOB_F16, count)
                   ? ABSTE_OK
                   : ABSTE_ERROR_BLOB;
    }
    if (node->weight != ABSTE_NONE)
        return ABSTE_ERROR_NODE;
    int fits = 0;
    if (pools)
        fits = in->c == out->c;
    else if (node->op == OP_IDENTITY)
        fits = same_size(in, out);
    else if (node->op == OP_FLATTEN)
        fits = out->h == 1 && out->w == 1 && out->c == (uint64_t)in->h * in->w * in->c;
    else if (node->op == OP_PAD)
        fits = out->h == (uint64_t)in->h + pad[0] + pad[2] && out->w == (uint64_t)in->w + pad[1] + pad[3] &&
               out->c == (uint64_t)in->c + node->pad_channels[0] + node->pad_channels[1];
    else { /* concat */
        const abste_value_record *other = value_at(model, node->in1);
        fits = in->h == other->h && in->w == other->w && in->h == out->h && in->w == out->w && out->c == in->c + other->c;
    }
    return fits ? ABSTE_OK : ABSTE_ERROR_NODE;
}

/* Values are numbered in the order in which they are written, so `written`, the number of those that stand before this node,
 * is all it takes to see that each is written once and read later. */
static abste_status check_node(const abste_model *model, uint32_t i, uint32_t *written, uint32_t *steps) {
    const abste_node_record *node = node_at(model, i);
    const uint32_t before = *written;
    if (node->op >= OP_COUNT || node->flags > COUNT_PADDING || (node->flags && node->op != OP_AVERAGE_POOL))
        return ABSTE_ERROR_NODE;
    if (node->pad_value < -1 || node->pad_value > 1 || (node->pad_value && node->op != OP_XNOR))
        return ABSTE_ERROR_NODE;
    for (int k = 0; k < 6; ++k)
        if (node->reserved[k])
            return ABSTE_ERROR_NODE;
    if (node->name >= model->string_bytes)
        return ABSTE_ERROR_STRING;
    if (node->in0 >= model->value_count || (node->op == OP_CONCAT) != (node->in1 != ABSTE_NONE))
        return ABSTE_ERROR_NODE;
    if (node->op == OP_CONCAT && node->in1 >= model->value_count)
        return ABSTE_ERROR_NODE;
    if (node->in0 >= before || (node->op == OP_CONCAT && node->in1 >= before))
        return ABSTE_ERROR_ORDER;
    if (value_at(model, node->in0)->kind != (node->op == OP_XNOR ? ABSTE_BITS : ABSTE_FLOAT))
        return ABSTE_ERROR_NODE;
    if (node->op == OP_CONCAT && value_at(model, node->in1)->kind != ABSTE_FLOAT)
        return ABSTE_ERROR_NODE;
    if (node->out == ABSTE_NONE && node->bits == ABSTE_NONE)
        return ABSTE_ERROR_NODE;
    const uint32_t outs[2] = {node->out, node->bits};
    for (int k = 0; k < 2; ++k) {
        if (outs[k] == ABSTE_NONE)
            continue;
        if (outs[k] >= model->value_count)
            return ABSTE_ERROR_NODE;
        if (outs[k] != *written)
            return ABSTE_ERROR_ORDER;
        if (value_at(model, outs[k])->kind != (k ? ABSTE_BITS : ABSTE_FLOAT))
            return ABSTE_ERROR_NODE;
        ++*written;
    }
    if (node->out != ABSTE_NONE && node->bits != ABSTE_NONE && !same_size(value_at(model, node->out), value_at(model, node->bits)))
        return ABSTE_ERROR_NODE;
    const abste_status status = check_sizes(model, node);
    if (status != ABSTE_OK)
        return status;
    if (node->first_step != *steps || node->step_count > model->step_count - *steps)
        return ABSTE_ERROR_STEP;
    for (uint32_t k = 0; k < node->step_count; ++k, ++*steps) {
        const abste_status wrong = check_step(model, node, before, *steps);
        if (wrong != ABSTE_OK)
            return wrong;
    }
    return ABSTE_OK;
}

static int is_operand(const abste_model *model, const abste_node_record *node, uint32_t value) {
    for (uint32_t k = 0; k < node->step_count; ++k) {
        const abste_step_record *step = step_at(model, node->first_step + k);
        if ((step->kind == STEP_ADD_VALUE || step->kind == STEP_MULTIPLY_VALUE) && step->a == value)
            return 1;
    }
    return 0;
}

/* The last node that reads a value; the number of nodes for an output. */
static uint32_t last_reader(const abste_model *model, uint32_t value, uint32_t birth) {
    if (value_at(model, value)->flags & IS_OUTPUT)
        return model->node_count;
    for (uint32_t i = model->node_count; i-- > 0;) {
        const abste_node_record *node = node_at(model, i);
        if (i <= birth && birth != ABSTE_NONE)
            return birth;
        if (node->in0 == value || node->in1 == value)
            return i;
        if (is_operand(model, node, value))
            return i;
    }
    return birth;
}

/* Whether `out` of a node may lie where `value` lay, which it is the last to read: number by number, it reads before it writes. */
static int in_place(const abste_model *model, const abste_node_record *node, uint32_t value) {
    const abste_value_record *before = value_at(model, value), *after = value_at(model, node->out);
    if (before->kind != ABSTE_FLOAT || before->offset != after->offset || before->h != after->h || before->w != after->w ||
        before->c != after->c)
        return 0;
    if (node->op == OP_IDENTITY && node->in0 == value)
        return 1;
    return node->in0 != value && node->in1 != value && is_operand(model, node, value);
}

/* Do two values that live at the same time share memory? Compares each with those that come after it. */
static abste_status check_overlap(const abste_model *model, uint32_t *where) {
    uint32_t birth = ABSTE_NONE, born = model->input_count; /* the node that writes value `v`, values there are after it */
    for (uint32_t v = 0; v < model->value_count; ++v) {
        while (v >= born) {
            const abste_node_record *node = node_at(model, ++birth);
            born += (node->out != ABSTE_NONE) + (node->bits != ABSTE_NONE);
        }
        const abste_value_record *value = value_at(model, v);
        const uint64_t begin = value->offset, end = begin + bytes_of(value);
        const uint32_t last = last_reader(model, v, birth);
        *where = v;
        uint32_t other_birth = birth, other_born = born;
        for (uint32_t u = v + 1; u < model->value_count; ++u) {
            while (u >= other_born) {
                const abste_node_record *node = node_at(model, ++other_birth);
                other_born += (node->out != ABSTE_NONE) + (node->bits != ABSTE_NONE);
            }
            if (other_birth != ABSTE_NONE && (last == ABSTE_NONE || other_birth > last))
                break;
            const abste_value_record *other = value_at(model, u);
            if (other->offset >= end || begin >= other->offset + bytes_of(other))
                continue;
            if (other_birth == last && last < model->node_count && node_at(model, last)->out == u &&
                in_place(model, node_at(model, last), v))
                continue;
            return ABSTE_ERROR_OVERLAP;
        }
    }
    *where = ABSTE_NONE;
    return ABSTE_OK;
}

static abste_status check(abste_model *model, uint32_t *where) {
    abste_status status = check_layout(model, where);
    if (status != ABSTE_OK)
        return status;
    model->output_count = 0;
    for (uint32_t i = 0; i < model->value_count; ++i) {
        *where = i;
        status = check_value(model, i);
        if (status != ABSTE_OK)
            return status;
        model->output_count += value_at(model, i)->flags & IS_OUTPUT;
    }
    uint32_t written = model->input_count, steps = 0;
    for (uint32_t i = 0; i < model->node_count; ++i) {
        *where = i;
        status = check_node(model, i, &written, &steps);
        if (status != ABSTE_OK)
            return status;
    }
    *where = ABSTE_NONE;
    if (steps != model->step_count)
        return ABSTE_ERROR_STEP;
    if (written != model->value_count)
        return ABSTE_ERROR_ORDER;
    if (model->output_count == 0)
        return ABSTE_ERROR_VALUE;
    if (model->normalization != ABSTE_NONE &&
        !is_blob(model, model->normalization, BLOB_F32, 2ull * value_at(model, 0)->c))
        return ABSTE_ERROR_BLOB;
    if (model->metadata != ABSTE_NONE &&
        (model->metadata >= model->blob_count || blob_at(model, model->metadata)->type != BLOB_TEXT))
        return ABSTE_ERROR_BLOB;
    if (model->classes != ABSTE_NONE) {
        if (model->classes >= model->blob_count || blob_at(model, model->classes)->type != BLOB_TEXT)
            return ABSTE_ERROR_BLOB;
        const abste_blob_record *blob = blob_at(model, model->classes);
        if (blob->bytes == 0 || model->data[blob->offset + blob->bytes - 1] != 0)
            return ABSTE_ERROR_BLOB;
    }
    return check_overlap(model, where);
}

abste_status abste_load(abste_model *model, const void *data, size_t bytes, uint32_t flags, uint32_t *where) {
    uint32_t ignored;
    where = where ? where : &ignored;
    *where = ABSTE_NONE;
    if (!model || !data || (uintptr_t)data % 4)
        return ABSTE_ERROR_ARGUMENT;
    const uint8_t *file = data;
    for (size_t i = 0; i < sizeof MAGIC; ++i)
        if (i >= bytes || file[i] != MAGIC[i])
            return ABSTE_ERROR_MAGIC;
    if (bytes < HEADER_BYTES)
        return ABSTE_ERROR_TRUNCATED;
    if (header_u32(file, 8) != 1) /* major 1, minor 0 */
        return ABSTE_ERROR_VERSION;
    if (header_u32(file, 12) != bytes)
        return ABSTE_ERROR_TRUNCATED;
    if (!(flags & ABSTE_SKIP_CHECKSUM) && checksum(file, bytes) != header_u32(file, CHECKSUM_AT))
        return ABSTE_ERROR_CHECKSUM;
    model->data = file;
    model->bytes = header_u32(file, 12);
    model->arena_bytes = header_u32(file, 20);
    model->value_count = header_u32(file, 24);
    model->node_count = header_u32(file, 28);
    model->step_count = header_u32(file, 32);
    model->blob_count = header_u32(file, 36);
    model->string_bytes = header_u32(file, 40);
    model->input_count = header_u32(file, 44);
    model->normalization = header_u32(file, 48);
    model->classes = header_u32(file, 52);
    model->metadata = header_u32(file, 56);
    model->packed = NULL;
    model->variant = NULL;
    model->int8 = model->scratch = 0;
    if (model->value_count > MAX_VALUES || model->node_count > MAX_NODES || model->step_count > MAX_STEPS ||
        model->blob_count > MAX_BLOBS || model->input_count == 0 || model->input_count > model->value_count ||
        model->arena_bytes % 64 || header_u32(file, 60))
        return ABSTE_ERROR_HEADER;
    return check(model, where);
}

const char *abste_message(abste_status status) {
    static const char *const messages[] = {
        "no error",
        "a pointer is null or not aligned (data to 4 bytes, the arena to 64)",
        "this is not an .abste file",
        "this .abste file was made for a newer reader",
        "this .abste file is not whole: its size is not what its header says",
        "this .abste file is damaged: its checksum does not match",
        "this .abste file has an impossible header",
        "a value of this .abste file is malformed or lies outside the arena",
        "a node of this .abste file is malformed or its sizes disagree",
        "a step of this .abste file is malformed or its operands do not fit",
        "a blob of this .abste file is malformed or does not fit its use",
        "a name of this .abste file lies outside its strings",
        "a value of this .abste file is read before it is written, or not written exactly once",
        "values of this .abste file that live at the same time overlap in the arena",
        "the arena is too small for this network",
        "a trace names a node or step that does not exist",
    };
    return (unsigned)status < sizeof messages / sizeof *messages ? messages[status] : "unknown status";
}

size_t abste_arena_bytes(const abste_model *model) {
    const uint64_t bytes = (uint64_t)model->arena_bytes + model->scratch;
    return bytes < SIZE_MAX ? (size_t)bytes : SIZE_MAX;
}

uint32_t abste_input_count(const abste_model *model) { return model->input_count; }
uint32_t abste_output_count(const abste_model *model) { return model->output_count; }
uint32_t abste_value_count(const abste_model *model) { return model->value_count; }
uint32_t abste_node_count(const abste_model *model) { return model->node_count; }

uint32_t abste_output(const abste_model *model, uint32_t i) {
    for (uint32_t v = 0; v < model->value_count; ++v)
        if ((value_at(model, v)->flags & IS_OUTPUT) && i-- == 0)
            return v;
    return ABSTE_NONE;
}

static const char *string(const abste_model *model, uint32_t offset) { return (const char *)model->strings + offset; }

int abste_value(const abste_model *model, uint32_t i, abste_value_info *info) {
    if (i >= model->value_count)
        return -1;
    const abste_value_record *value = value_at(model, i);
    info->name = string(model, value->name);
    info->kind = (abste_kind)value->kind;
    info->rank = value->rank;
    info->h = value->h;
    info->w = value->w;
    info->c = value->c;
    info->is_output = value->flags & IS_OUTPUT;
    return 0;
}

int abste_node(const abste_model *model, uint32_t i, abste_node_info *info) {
    static const char *const names[OP_COUNT] = {"identity", "conv",   "sign_conv", "xnor",   "max_pool",
                                                "average_pool", "concat", "pad",       "flatten"};
    static const uint8_t bits[5] = {32, 16, 1, 32, 8};
    if (i >= model->node_count)
        return -1;
    const abste_node_record *node = node_at(model, i);
    const abste_value_record *out = written_by(model, node);
    info->name = string(model, node->name);
    info->operation = names[node->op];
    info->out = node->out != ABSTE_NONE ? node->out : node->bits;
    info->step_count = node->step_count;
    info->input_bits = value_at(model, node->in0)->kind == ABSTE_BITS ? 1 : abste_int8(model, model->int8, node) ? 8 : 32;
    info->weight_bits = info->weight_count = 0;
    info->macs = 0;
    if (node->weight != ABSTE_NONE) {
        const abste_blob_record *blob = blob_at(model, node->weight);
        info->weight_bits = bits[blob->type];
        info->weight_count = blob->count;
        info->macs = (uint64_t)blob->count * out->h * out->w;
    }
    /* A window reads no more than there is, and what there is fits into the arena: neither product overflows. */
    const abste_value_record *in = value_at(model, node->in0);
    const uint64_t written = (uint64_t)out->h * out->w * out->c;
    const uint64_t rows = node->kernel[0] < in->h ? node->kernel[0] : in->h;
    const uint64_t columns = node->kernel[1] < in->w ? node->kernel[1] : in->w;
    info->work = info->macs > written * rows * columns ? info->macs : written * rows * columns;
    return 0;
}

const char *abste_step_name(const abste_model *model, uint32_t node, uint32_t step) {
    if (node >= model->node_count || step >= node_at(model, node)->step_count)
        return NULL;
    return string(model, step_at(model, node_at(model, node)->first_step + step)->name);
}

int abste_step_kind(const abste_model *model, uint32_t node, uint32_t step) {
    if (node >= model->node_count || step >= node_at(model, node)->step_count)
        return -1;
    return step_at(model, node_at(model, node)->first_step + step)->kind;
}

const float *abste_normalization(const abste_model *model) {
    return model->normalization == ABSTE_NONE ? NULL : blob_data(model, model->normalization);
}

static const char *text(const abste_model *model, uint32_t blob, size_t *bytes) {
    *bytes = blob == ABSTE_NONE ? 0 : blob_at(model, blob)->bytes;
    return blob == ABSTE_NONE ? NULL : blob_data(model, blob);
}

const char *abste_classes(const abste_model *model, size_t *bytes) { return text(model, model->classes, bytes); }
const char *abste_metadata(const abste_model *model, size_t *bytes) { return text(model, model->metadata, bytes); }
