/* Operations that only move numbers: identity, concat, pad, flatten. */
#include "../src/internal.h"

static const float *pixel(const abste_job *job, uint32_t y, uint32_t x) {
    return job->in + ((size_t)y * job->W + x) * job->C;
}

void abste_identity_scalar(const abste_job *job, uint32_t y, uint32_t x, uint32_t o, uint32_t n, abste_sums *sums) {
    const float *in = pixel(job, y, x) + o;
    for (uint32_t k = 0; k < n; ++k)
        sums->f[k] = in[k];
}

void abste_concat_scalar(const abste_job *job, uint32_t y, uint32_t x, uint32_t o, uint32_t n, abste_sums *sums) {
    const float *in0 = pixel(job, y, x);
    const float *in1 = job->in1 + ((size_t)y * job->W + x) * job->in1_c;
    for (uint32_t k = 0; k < n; ++k)
        sums->f[k] = o + k < job->C ? in0[o + k] : in1[o + k - job->C];
}

void abste_pad_scalar(const abste_job *job, uint32_t y, uint32_t x, uint32_t o, uint32_t n, abste_sums *sums) {
    const abste_node_record *node = job->node;
    const uint32_t r = y - node->padding[0], s = x - node->padding[1]; /* wraps around, and is then beyond the input */
    const int inside = r < job->H && s < job->W;
    const float *in = inside ? pixel(job, r, s) : job->in;
    for (uint32_t k = 0; k < n; ++k) {
        const uint32_t c = o + k - node->pad_channels[0];
        sums->f[k] = inside && c < job->C ? in[c] : node->fill;
    }
}

void abste_flatten_scalar(const abste_job *job, uint32_t y, uint32_t x, uint32_t o, uint32_t n, abste_sums *sums) {
    const size_t area = (size_t)job->H * job->W;
    (void)y, (void)x;
    for (uint32_t k = 0; k < n; ++k)
        sums->f[k] = job->in[(o + k) % area * job->C + (o + k) / area];
}
