/* Classifies an image with a network that lies in read-only memory, in an arena of fixed size: no allocation, no operating
 * system but for reading the pixels and printing.
 *
 *     classify < image.rgb        the pixels, one byte per channel, row by row, channel by channel within a pixel
 */
#include "abste.h"

#include <stdio.h>

/* The file as numbers, which `make` writes. */
static _Alignas(64) const uint8_t MODEL[] = {
#include "model.inc"
};

#ifndef ARENA_BYTES
#define ARENA_BYTES (256 * 1024) /* `abste inspect` prints what a network needs */
#endif
#ifndef MOST_NUMBERS
#define MOST_NUMBERS (64 * 64 * 3) /* of an image, and of logits */
#endif

static _Alignas(64) uint8_t arena[ARENA_BYTES];
static float image[MOST_NUMBERS], logits[MOST_NUMBERS];

static int fail(const char *why) {
    fprintf(stderr, "classify: %s\n", why);
    return 1;
}

int main(void) {
    abste_model model;
    abste_value_info input, output;
    const abste_status loaded = abste_load(&model, MODEL, sizeof MODEL, 0, NULL);
    if (loaded != ABSTE_OK)
        return fail(abste_message(loaded));
    if (abste_input_count(&model) != 1 || abste_output_count(&model) != 1)
        return fail("this network does not take one image and give one vector");
    abste_value(&model, 0, &input);
    abste_value(&model, abste_output(&model, 0), &output);
    const uint32_t pixels = input.h * input.w, classes = output.h * output.w * output.c;
    if (pixels > MOST_NUMBERS / input.c || classes > MOST_NUMBERS)
        return fail("this network needs a larger MOST_NUMBERS");

    /* Pixels between 0 and 1, less the mean, over the standard deviation: as in training. */
    const float *normalization = abste_normalization(&model);
    for (uint32_t i = 0; i < pixels * input.c; ++i) {
        const int byte = getchar();
        if (byte == EOF)
            return fail("the image is too short");
        image[i] = (float)byte / 255.0f;
        if (normalization)
            image[i] = (image[i] - normalization[i % input.c]) / normalization[input.c + i % input.c];
    }

    const float *const inputs[] = {image};
    float *const outputs[] = {logits};
    const abste_run_arguments run = {
        .arena = arena, .arena_bytes = sizeof arena, .inputs = inputs, .outputs = outputs, .layout = ABSTE_NHWC};
    const abste_status ran = abste_run(&model, &run);
    if (ran != ABSTE_OK)
        return fail(abste_message(ran));

    /* The names stand one behind the other, each ended by a zero byte. */
    size_t bytes = 0;
    const char *name = abste_classes(&model, &bytes), *end = name ? name + bytes : name;
    for (uint32_t i = 0; i < classes; ++i) {
        printf("%-12s %9.5f\n", name && name < end ? name : "?", (double)logits[i]);
        while (name && name < end && *name++)
            ;
    }
    return 0;
}
