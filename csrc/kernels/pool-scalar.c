/* Maximum and average over a window. */
#include "../src/internal.h"

#include <math.h>

typedef struct {
    int64_t row, column; /* of the first tap */
    abste_range i, j;    /* the taps inside */
} window_place;

static window_place place(const abste_job *job, uint32_t y, uint32_t x) {
    const abste_node_record *node = job->node;
    window_place at;
    at.row = (int64_t)y * node->stride[0] - node->padding[0];
    at.column = (int64_t)x * node->stride[1] - node->padding[1];
    at.i = taps_inside(at.row, node->kernel[0], node->dilation[0], job->H);
    at.j = taps_inside(at.column, node->kernel[1], node->dilation[1], job->W);
    return at;
}

static const float *tap(const abste_job *job, const window_place *at, uint32_t i, uint32_t j) {
    const size_t r = (size_t)(at->row + (int64_t)i * job->node->dilation[0]);
    const size_t s = (size_t)(at->column + (int64_t)j * job->node->dilation[1]);
    return job->in + (r * job->W + s) * job->C;
}

void abste_max_pool_scalar(const abste_job *job, uint32_t y, uint32_t x, uint32_t o, uint32_t n, abste_sums *sums) {
    const window_place at = place(job, y, x);
    for (uint32_t k = 0; k < n; ++k)
        sums->f[k] = -INFINITY;
    for (uint32_t i = at.i.first; i < at.i.last; ++i)
        for (uint32_t j = at.j.first; j < at.j.last; ++j) {
            const float *in = tap(job, &at, i, j) + o;
            for (uint32_t k = 0; k < n; ++k) {
                const float most = sums->f[k]; /* once NaN, no comparison replaces it */
                sums->f[k] = most == most && !(in[k] <= most) ? in[k] : most;
            }
        }
}

/* How many taps the divisor counts along one side. */
static int64_t counted(const abste_job *job, int64_t start, abste_range inside, uint32_t kernel, uint32_t size, uint32_t after) {
    if (!(job->node->flags & COUNT_PADDING))
        return (int64_t)inside.last - inside.first;
    const int64_t end = start + kernel, limit = (int64_t)size + after;
    return (end < limit ? end : limit) - start;
}

float abste_pool_divisor(const abste_job *job, int64_t row, int64_t column, abste_range i, abste_range j) {
    const abste_node_record *node = job->node;
    return (float)(counted(job, row, i, node->kernel[0], job->H, node->padding[2]) *
                   counted(job, column, j, node->kernel[1], job->W, node->padding[3]));
}

void abste_average_pool_scalar(const abste_job *job, uint32_t y, uint32_t x, uint32_t o, uint32_t n, abste_sums *sums) {
    const window_place at = place(job, y, x);
    for (uint32_t k = 0; k < n; ++k)
        sums->f[k] = 0;
    for (uint32_t i = at.i.first; i < at.i.last; ++i)
        for (uint32_t j = at.j.first; j < at.j.last; ++j) {
            const float *in = tap(job, &at, i, j) + o;
            for (uint32_t k = 0; k < n; ++k)
                sums->f[k] += in[k];
        }
    const float divisor = abste_pool_divisor(job, at.row, at.column, at.i, at.j);
    for (uint32_t k = 0; k < n; ++k)
        sums->f[k] /= divisor;
}
