/* Runs a checked network: each node computes sums block by block, sends them through its steps, and stores floats and bits. */
#include "internal.h"

#include <string.h>

static const abste_kernel KERNELS[OP_COUNT] = {
    abste_identity_scalar,     abste_conv_scalar,   abste_sign_conv_scalar, abste_xnor_scalar,   abste_max_pool_scalar,
    abste_average_pool_scalar, abste_concat_scalar, abste_pad_scalar,       abste_flatten_scalar};

/* The functions of docs/format.md, operation by operation. */

static float exp32(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    if (x != x)
        return x;
    const float t = x * 1.44269504f + 0.5f;
    int32_t whole = (int32_t)t;
    whole -= (float)whole > t;
    const float n = (float)whole;
    float r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const uint32_t pattern = (uint32_t)(whole + 127) << 23;
    float power;
    memcpy(&power, &pattern, sizeof power);
    return ((p * (r * r) + r) + 1.0f) * power;
}

static float sigmoid32(float x) { return 1.0f / (1.0f + exp32(-x)); }

static float tanh32(float x) { return 1.0f - 2.0f / (exp32(2.0f * x) + 1.0f); }

static float erf32(float x) {
    const float a = x < 0 ? -x : x;
    const float t = 1.0f / (1.0f + 0.3275911f * a);
    float p = 1.061405429f;
    p = p * t + -1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t + -0.284496736f;
    p = p * t + 0.254829592f;
    const float y = 1.0f - (p * t) * exp32(-(a * a));
    return x < 0 ? -y : y;
}

static float clamp32(float v, float low, float high) { return v < low ? low : v > high ? high : v; }

void abste_apply_scalar(const abste_job *job, const abste_step_record *step, uint32_t y, uint32_t x, uint32_t o, uint32_t n,
                        float *v) {
    const float *a = NULL, *b = NULL;
    size_t next;
    switch (step->kind) {
    case STEP_AFFINE:
        b = (const float *)blob_data(job->model, step->b) + o;
        a = (const float *)blob_data(job->model, step->a) + o;
        break;
    case STEP_MULTIPLY:
    case STEP_ADD:
    case STEP_PRELU:
        a = (const float *)blob_data(job->model, step->a) + o;
        break;
    case STEP_ADD_VALUE:
    case STEP_MULTIPLY_VALUE:
        a = operand_at(job, step, y, x, &next) + o;
        break;
    default:
        break;
    }
    switch (step->kind) {
    case STEP_AFFINE:
        for (uint32_t k = 0; k < n; ++k)
            v[k] = v[k] * a[k] + b[k];
        break;
    case STEP_MULTIPLY:
    case STEP_MULTIPLY_VALUE:
        for (uint32_t k = 0; k < n; ++k)
            v[k] *= a[k];
        break;
    case STEP_ADD:
    case STEP_ADD_VALUE:
        for (uint32_t k = 0; k < n; ++k)
            v[k] += a[k];
        break;
    case STEP_RELU: {
        const float zero = step->p; /* so that compilers do not know: of v < 0 ? 0 : v clang 14 makes a maximum on ARM, and of -0 0 */
        for (uint32_t k = 0; k < n; ++k)
            v[k] = v[k] < zero ? 0 : v[k];
        break;
    }
    case STEP_PRELU:
        for (uint32_t k = 0; k < n; ++k)
            v[k] = v[k] < 0 ? v[k] * a[k] : v[k];
        break;
    case STEP_CLAMP:
        for (uint32_t k = 0; k < n; ++k)
            v[k] = clamp32(v[k], step->p, step->q);
        break;
    case STEP_GELU:
        for (uint32_t k = 0; k < n; ++k)
            v[k] = (0.5f * v[k]) * (1.0f + erf32(v[k] * 0.70710678f));
        break;
    case STEP_GELU_TANH:
        for (uint32_t k = 0; k < n; ++k)
            v[k] = (0.5f * v[k]) * (1.0f + tanh32(0.79788456f * (v[k] + 0.044715f * ((v[k] * v[k]) * v[k]))));
        break;
    case STEP_SILU:
        for (uint32_t k = 0; k < n; ++k)
            v[k] *= sigmoid32(v[k]);
        break;
    case STEP_SIGMOID:
        for (uint32_t k = 0; k < n; ++k)
            v[k] = sigmoid32(v[k]);
        break;
    case STEP_HARDSWISH:
        for (uint32_t k = 0; k < n; ++k)
            v[k] = (v[k] * clamp32(v[k] + 3.0f, 0, 6)) / 6.0f;
        break;
    case STEP_HARDSIGMOID:
        for (uint32_t k = 0; k < n; ++k)
            v[k] = clamp32(v[k] + 3.0f, 0, 6) / 6.0f;
        break;
    case STEP_TANH:
        for (uint32_t k = 0; k < n; ++k)
            v[k] = tanh32(v[k]);
        break;
    case STEP_SIGN:
        for (uint32_t k = 0; k < n; ++k)
            v[k] = v[k] >= 0 ? 1.0f : -1.0f;
        break;
    default: /* abste_load lets no other pass */
        break;
    }
}

static void threshold(const abste_job *job, const abste_step_record *step, uint32_t o, uint32_t n, abste_sums *sums) {
    const int32_t *pairs = (const int32_t *)blob_data(job->model, step->a) + 2 * (size_t)o;
    for (uint32_t k = 0; k < n; ++k)
        sums->f[k] = pairs[2 * k + 1] * sums->i[k] >= pairs[2 * k] ? 1.0f : -1.0f;
}

/* Copies what stands at a point of this node to those who asked for it. */
static void trace(const abste_job *job, int32_t point, size_t at, uint32_t n, const abste_sums *sums) {
    for (uint32_t k = 0; k < job->arguments->trace_count; ++k) {
        const abste_trace *wanted = &job->arguments->traces[k];
        if (wanted->node == job->number && wanted->point == point)
            memcpy((float *)wanted->buffer + at, sums, n * sizeof(float));
    }
}

static void finish_pixel(const abste_job *job, uint32_t y, uint32_t x, uint32_t o, uint32_t n, abste_sums *sums) {
    const abste_node_record *node = job->node;
    const size_t pixel = (size_t)y * job->w + x, at = pixel * job->c + o;
    trace(job, -1, at, n, sums);
    uint32_t k = 0;
    if (node->op == OP_XNOR) {
        if (node->step_count && step_at(job->model, node->first_step)->kind == STEP_THRESHOLD) {
            threshold(job, step_at(job->model, node->first_step), o, n, sums);
            trace(job, 0, at, n, sums);
            k = 1;
        } else {
            for (uint32_t m = 0; m < n; ++m)
                sums->f[m] = (float)sums->i[m];
        }
    }
    for (; k < node->step_count; ++k) {
        abste_apply_scalar(job, step_at(job->model, node->first_step + k), y, x, o, n, sums->f);
        trace(job, (int32_t)k, at, n, sums);
    }
    if (job->out)
        memcpy(job->out + at, sums->f, n * sizeof(float));
    if (job->out_bits) {
        uint32_t *packed = job->out_bits + pixel * words_of(job->c) + o / 32;
        for (uint32_t m = 0; m < n; m += 32) {
            uint32_t word = 0;
            for (uint32_t b = 0; b < 32 && m + b < n; ++b)
                word |= (uint32_t)(sums->f[m + b] >= 0) << b;
            packed[m / 32] = word;
        }
    }
}

void abste_finish_scalar(const abste_job *job, uint32_t y, uint32_t x, uint32_t pixels, uint32_t o, uint32_t n, abste_sums *sums) {
    for (uint32_t p = 0; p < pixels; ++p)
        finish_pixel(job, y, x + p, o, n, &sums[p]);
}

/* What may be done by different threads: a row, or some, of a block of channels. Channels outermost: the weights of a block stay in
 * the cache while all rows pass by. */
static void units(void *argument, uint32_t begin, uint32_t end) {
    const abste_job *job = argument;
    _Alignas(64) abste_sums sums;
    for (uint32_t unit = begin; unit < end; ++unit) {
        const uint32_t groups = (job->h + job->rows - 1) / job->rows, o = unit / groups * job->block, y = unit % groups * job->rows;
        const uint32_t n = job->c - o < job->block ? job->c - o : job->block;
        if (job->row) {
            job->row(job, y, o, n);
            continue;
        }
        for (uint32_t x = 0; x < job->w; ++x) {
            job->kernel(job, y, x, o, n, &sums);
            job->finish(job, y, x, 1, o, n, &sums);
        }
    }
}

/* Kernels that take all channels of a row at once prepare something from its inputs. A linear layer has one row: there, several
 * threads prepare the same, so that each has channels of its own. */
#define PARTS_OF_A_ROW 4u

static void share(const abste_run_arguments *arguments, uint32_t count, abste_task task, abste_job *job) {
    if (arguments->parallel_for)
        arguments->parallel_for(arguments->pool, count, task, job);
    else
        task(job, 0, count);
}

static void find_most(void *argument, uint32_t begin, uint32_t end) {
    const abste_job *job = argument;
    for (uint32_t y = begin; y < end; ++y)
        int8_kernel(job->model->variant)->most(job, y);
}

static void make_inputs(void *argument, uint32_t begin, uint32_t end) {
    const abste_job *job = argument;
    for (uint32_t y = begin; y < end; ++y)
        int8_kernel(job->model->variant)->inputs(job, y);
}

/* The inputs as integers, behind the values in the arena. */
static void prepare_int8(abste_job *job) {
    const abste_node_record *node = job->node;
    job->eight = (uint8_t *)job->arguments->arena + job->model->arena_bytes;
    job->eight_row = ((size_t)node->padding[1] + job->W + node->padding[3]) * job->C;
    job->row_most = (float *)(void *)(job->eight + abste_int8_rows_bytes(job->eight_row * job->H));
    share(job->arguments, job->H, find_most, job);
    float most = 0;
    for (uint32_t y = 0; y < job->H; ++y)
        most = job->row_most[y] > most ? job->row_most[y] : most;
    job->eight_scale = most / 127.0f;
    job->eight_times = 127.0f / most;
    share(job->arguments, job->H, make_inputs, job);
    job->kernel = int8_kernel(job->model->variant)->kernel;
}

abste_job abste_job_of(const abste_model *model, const abste_node_record *node) {
    const abste_value_record *in = value_at(model, node->in0), *out = written_by(model, node);
    abste_job job = {.model = model, .node = node, .kernel = KERNELS[node->op], .block = BLOCK, .rows = 1};
    job.H = in->h, job.W = in->w, job.C = in->c, job.h = out->h, job.w = out->w, job.c = out->c;
    job.words = words_of(in->c);
    if (node->weight != ABSTE_NONE) {
        job.weight = blob_data(model, node->weight);
        job.half = blob_at(model, node->weight)->type == BLOB_F16;
    }
    return job;
}

/* Once for a node: kernels look at a step again for every few numbers. */
static void look_up_steps(const abste_job *job, abste_step *steps) {
    for (uint32_t k = 0; k < job->node->step_count; ++k) {
        const abste_step_record *step = step_at(job->model, job->node->first_step + k);
        abste_step *found = &steps[k];
        *found = (abste_step){.kind = step->kind, .p = step->p, .q = step->q};
        if (step->kind == STEP_ADD_VALUE || step->kind == STEP_MULTIPLY_VALUE) {
            found->a = operand_at(job, step, 0, 0, &found->next);
            continue;
        }
        found->a = step->a != ABSTE_NONE ? blob_data(job->model, step->a) : NULL;
        found->b = step->b != ABSTE_NONE ? blob_data(job->model, step->b) : NULL;
    }
}

static void run_node(const abste_model *model, const abste_run_arguments *arguments, uint32_t i, const abste_packed_kernel *kernel,
                     const uint8_t *packed) {
    const abste_node_record *node = node_at(model, i);
    const abste_variant *variant = model->variant;
    uint8_t *arena = arguments->arena;
    const uint8_t *in = arena + value_at(model, node->in0)->offset;
    abste_step steps[MOST_STEPS];
    abste_job job = abste_job_of(model, node);
    job.arguments = arguments, job.number = i, job.packed = packed;
    job.in = (const float *)(const void *)in;
    job.bits = (const uint32_t *)(const void *)in;
    job.finish = abste_finish_scalar;
    if (variant && !arguments->trace_count && node->step_count <= MOST_STEPS) {
        look_up_steps(&job, steps);
        job.steps = steps;
        job.finish = variant->finish;
    }
    if (node->op == OP_CONCAT) {
        job.in1 = floats(&job, node->in1);
        job.in1_c = value_at(model, node->in1)->c;
    }
    if (node->out != ABSTE_NONE)
        job.out = (float *)(void *)(arena + value_at(model, node->out)->offset);
    if (node->bits != ABSTE_NONE)
        job.out_bits = (uint32_t *)(void *)(arena + value_at(model, node->bits)->offset);
    if (abste_int8(model, model->int8, node)) {
        prepare_int8(&job);
        job.row = kernel->row;
    } else if (packed) {
        job.row = kernel->row;
        if (kernel->whole)
            job.block = job.c, job.rows = node->kernel[0] > 1 ? ROWS_AT_ONCE : 1;
    } else if (variant) {
        job.row = variant->in_place(model, node);
    }
    if (arguments->parallel_for && job.h == 1 && job.block > BLOCK)
        job.block = ((job.c + BLOCK - 1) / BLOCK + PARTS_OF_A_ROW - 1) / PARTS_OF_A_ROW * BLOCK;
    /* No overflow: a value of 2^32 bytes at most has fewer blocks of channels. */
    share(arguments, (job.h + job.rows - 1) / job.rows * ((job.c + job.block - 1) / job.block), units, &job);
}

/* Between an image of the caller and a value in the arena, which is NHWC. */
static void copy(const abste_value_record *value, abste_layout layout, const float *from, float *to, int in) {
    const size_t area = (size_t)value->h * value->w, c = value->c;
    if (layout == ABSTE_NHWC || area == 1) {
        memcpy(to, from, area * c * sizeof(float));
        return;
    }
    for (size_t pixel = 0; pixel < area; ++pixel)
        for (size_t k = 0; k < c; ++k) {
            if (in)
                to[pixel * c + k] = from[k * area + pixel];
            else
                to[k * area + pixel] = from[pixel * c + k];
        }
}

abste_status abste_run(const abste_model *model, const abste_run_arguments *arguments) {
    if (!model || !arguments || !arguments->inputs || !arguments->outputs || (arguments->trace_count && !arguments->traces))
        return ABSTE_ERROR_ARGUMENT;
    const size_t arena_bytes = abste_arena_bytes(model);
    if (arena_bytes && (!arguments->arena || (uintptr_t)arguments->arena % 64))
        return ABSTE_ERROR_ARGUMENT;
    if (arguments->arena_bytes < arena_bytes || arena_bytes == SIZE_MAX)
        return ABSTE_ERROR_ARENA;
    for (uint32_t k = 0; k < arguments->trace_count; ++k) {
        const abste_trace *wanted = &arguments->traces[k];
        if (!wanted->buffer || wanted->node >= model->node_count || wanted->point < -1 ||
            (wanted->point >= 0 && (uint32_t)wanted->point >= node_at(model, wanted->node)->step_count))
            return ABSTE_ERROR_TRACE;
    }
    uint8_t *arena = arguments->arena;
    for (uint32_t i = 0; i < model->input_count; ++i) {
        const abste_value_record *value = value_at(model, i);
        if (!arguments->inputs[i])
            return ABSTE_ERROR_ARGUMENT;
        copy(value, arguments->layout, arguments->inputs[i], (float *)(void *)(arena + value->offset), 1);
    }
    if (arguments->progress)
        arguments->progress(arguments->observer, ABSTE_NONE);
    const abste_variant *variant = model->variant;
    size_t at = 0;
    for (uint32_t i = 0; i < model->node_count; ++i) {
        const abste_packed_kernel *kernel;
        const size_t bytes = abste_node_packed_bytes(model, variant, model->int8, node_at(model, i), &kernel);
        run_node(model, arguments, i, kernel, bytes ? model->packed + at : NULL);
        if (arguments->progress)
            arguments->progress(arguments->observer, i);
        at += bytes;
    }
    for (uint32_t v = 0, i = 0; v < model->value_count; ++v) {
        const abste_value_record *value = value_at(model, v);
        if (!(value->flags & IS_OUTPUT))
            continue;
        if (arguments->outputs[i])
            copy(value, arguments->layout, (const float *)(const void *)(arena + value->offset), arguments->outputs[i], 0);
        ++i;
    }
    return ABSTE_OK;
}
