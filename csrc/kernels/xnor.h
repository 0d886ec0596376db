/* xnor in words: what kernels share whose lanes are output channels of 32 weights each.
 *
 * A lane of a register is one output channel: 32 of its weights meet 32 input bits that all lanes share. The weights of a block of
 * 64 channels lie tap after tap, word after word, 64 words each, so that the kernel reads them from front to back.
 */
#ifndef ABSTE_XNOR_H
#define ABSTE_XNOR_H

#include "../src/internal.h"

/* Taps of one row of the kernel that lie next to each other in the input, and so in the weight. */
typedef struct {
    const uint32_t *in, *weight;
    uint32_t words;
} run_of_taps;

#define MOST_RUNS 64u
#define MOST_OUTSIDE 64u /* words of a pixel of the border, where that counts: 2048 channels */
#define MOST_PIXELS 7u /* that any of the kernels takes at once */

/* Where sums go: through thresholds to bits, if there are any; through the steps of `job`, if there is one; or to `sums`. */
typedef struct {
    const abste_job *job;
    uint32_t y, x, o; /* of the first pixel and channel */
    abste_sums *sums;
    const int32_t *thresholds; /* pairs, from the first channel on */
    uint32_t *bits;            /* the word of those channels of the first pixel; `words` further is the next pixel */
    size_t words;
    uint32_t channels, some; /* how many of those that a kernel takes at once exist, and a bit for each of the first 32 */
    uint32_t first;
} destination;

static inline size_t xnor_bytes(const abste_model *model, const abste_node_record *node) {
    const uint32_t taps = (uint32_t)node->kernel[0] * node->kernel[1];
    if (node->groups != 1 || taps > MOST_RUNS)
        return 0;
    const uint64_t blocks = (written_by(model, node)->c + BLOCK - 1) / BLOCK;
    return (size_t)(blocks * BLOCK * taps * words_of(value_at(model, node->in0)->c) * sizeof(uint32_t));
}

/* Bits beyond the channels are zero, as they are in the input, and count for nothing; so do lanes beyond the last channel. */
static inline void xnor_pack(const abste_model *model, const abste_node_record *node, void *memory) {
    const uint32_t C = value_at(model, node->in0)->c, c = written_by(model, node)->c;
    const uint32_t taps = (uint32_t)node->kernel[0] * node->kernel[1], words = words_of(C);
    const uint32_t *weight = blob_data(model, node->weight);
    uint32_t *out = memory;
    for (uint32_t o = 0; o < c; o += BLOCK)
        for (uint32_t tap = 0; tap < taps; ++tap)
            for (uint32_t word = 0; word < words; ++word)
                for (uint32_t m = 0; m < BLOCK; ++m) {
                    const uint32_t left = C - 32 * word, count = left < 32 ? left : 32;
                    const uint64_t at = ((uint64_t)(o + m) * taps + tap) * C + 32 * word;
                    *out++ = o + m < c ? bits_at(weight, at, count) : 0;
                }
}

/* `taps` - 2 (set bits of input ^ weight) for some neighbouring pixels, `step` words apart, and 32 or 64 channels from to->first
 * on. */
typedef void (*counter)(const run_of_taps *runs, uint32_t count, size_t step, int32_t taps, const destination *to);

/* Steps cost less for several pixels at a time: sums wait for company, until there are so many or the row ends. */
#define WAITING (4 * MOST_PIXELS)
static inline uint32_t sent(const abste_job *job, uint32_t y, uint32_t x, uint32_t waiting, uint32_t enough, uint32_t o, uint32_t n,
                            abste_sums *sums) {
    if (waiting < enough)
        return waiting;
    job->finish(job, y, x - waiting, waiting, o, n, sums);
    return 0;
}

/* A row of pixels, at most `most` at a time; counters[p] counts for p of them and `wide` channels, and takes them through the
 * steps if it is `able`. */
static inline void xnor_row(const abste_job *job, uint32_t y, uint32_t o, uint32_t n, const counter *counters, uint32_t most,
                            uint32_t wide, int able) {
    const abste_node_record *node = job->node;
    const uint32_t kh = node->kernel[0], kw = node->kernel[1], words = job->words;
    const uint32_t *weights = (const uint32_t *)job->packed + (size_t)o * kh * kw * words;
    const int64_t row = (int64_t)y * node->stride[0] - node->padding[0];
    const abste_range is = taps_inside(row, kh, node->dilation[0], job->H);
    const size_t step = (size_t)node->stride[1] * words;
    _Alignas(64) abste_sums sums[WAITING];
    uint32_t waiting = 0; /* sums of the pixels before x, which have not been through the steps */
    uint32_t outside[MOST_OUTSIDE]; /* the bits of a pixel of the border */
    for (uint32_t k = 0; node->pad_value && k < words && k < MOST_OUTSIDE; ++k)
        outside[k] = node->pad_value < 0 ? 0 : k < job->C / 32 ? 0xFFFFFFFFu : (1u << job->C % 32) - 1;
    destination to = {.words = words_of(job->c)};
    const int32_t *pairs = NULL;
    if (node->step_count && step_at(job->model, node->first_step)->kind == STEP_THRESHOLD && !job->arguments->trace_count)
        pairs = (const int32_t *)blob_data(job->model, step_at(job->model, node->first_step)->a) + 2 * (size_t)o;
    const int direct = pairs || (able && job->finish != abste_finish_scalar);
    if (direct && !pairs)
        to.job = job, to.y = y;
    for (uint32_t x = 0; x < job->w;) {
        const int64_t column = (int64_t)x * node->stride[1] - node->padding[1];
        const abste_range js = taps_inside(column, kw, node->dilation[1], job->W);
        const int border = node->pad_value && (is.first || is.last < kh || js.first || js.last < kw);
        if (border && words > MOST_OUTSIDE) {
            job->kernel(job, y, x, o, n, &sums[waiting]);
            waiting = sent(job, y, ++x, waiting + 1, direct ? 1 : WAITING, o, n, sums);
            continue;
        }
        run_of_taps runs[MOST_RUNS];
        uint32_t count = 0;
        /* Where the border counts, every tap by itself; else those inside, of which those of a row may follow each other. */
        const uint32_t pixels = border ? 1 : pixels_alike(job, column, js, job->w - x);
        const abste_range down = border ? (abste_range){0, kh} : is, across = border ? (abste_range){0, kw} : js;
        const uint32_t together = node->dilation[1] == 1 && !border ? js.last - js.first : 1;
        for (uint32_t i = down.first; i < down.last; ++i)
            for (uint32_t j = across.first; j < across.last; j += together) {
                const size_t r = (size_t)(row + (int64_t)i * node->dilation[0]);
                const size_t s = (size_t)(column + (int64_t)j * node->dilation[1]);
                const int inside = i >= is.first && i < is.last && j >= js.first && j < js.last;
                runs[count].in = inside ? job->bits + (r * job->W + s) * words : outside;
                runs[count].weight = weights + ((size_t)i * kw + j) * words * BLOCK;
                runs[count++].words = together * words;
            }
        const int32_t taps = (int32_t)((down.last - down.first) * (across.last - across.first) * job->C);
        for (const uint32_t end = x + pixels; x < end;) {
            const uint32_t room = most - waiting % most, some = end - x < room ? end - x : room;
            to.sums = sums + waiting;
            to.x = x;
            for (uint32_t first = 0; first < n; first += wide) {
                to.first = first, to.o = o + first;
                to.channels = n - first < wide ? n - first : wide;
                to.some = 0xFFFFFFFFu >> (to.channels < 32 ? 32 - to.channels : 0);
                if (pairs)
                    to.thresholds = pairs + 2 * first;
                if (job->out_bits)
                    to.bits = job->out_bits + ((size_t)y * job->w + x) * to.words + (o + first) / 32;
                counters[some](runs, count, step, taps, &to);
            }
            x += some;
            for (uint32_t r = 0; x < end && r < count; ++r)
                runs[r].in += some * step;
            if (!direct)
                waiting = sent(job, y, x, waiting + some, WAITING, o, n, sums);
        }
    }
    sent(job, y, job->w, waiting, 1, o, n, sums);
}

#endif
