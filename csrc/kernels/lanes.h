/* Registers of floats, of any width: float kernels are written once, for every instruction set that has such registers.
 *
 * A file that includes this has defined LANES, how many floats a register holds; TARGET, the attribute of functions that use them;
 * FROM_HALVES(p), the LANES f16 at p as lanes; LESS(a, b), AT_LEAST(a, b) and AT_LEAST_INTEGER(a, b), the mask of the lanes where that
 * is so; SELECT(mask, a, b), lanes of a where the mask is set, else of b; WHERE_NOT(mask, v), lanes of v, and 0 where the mask is set;
 * SET_BITS(mask), a bit for each lane that is set. LOAD_FEW and STORE_FEW, as load_few and store_few below, if it has something better.
 *
 * Nothing is read or written beyond what there is: registers that are not full are loaded and stored lane by lane.
 */
#ifndef ABSTE_LANES_H
#define ABSTE_LANES_H

#include "../src/internal.h"

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t ilanes __attribute__((vector_size(4 * LANES)));
/* The same in memory that is aligned to one float. */
typedef float loose_lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t loose_ilanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE TARGET static inline __attribute__((always_inline))

INLINE lanes load_lanes(const float *p) { return *(const loose_lanes *)(const void *)p; }
INLINE void store_lanes(float *p, lanes v) { *(loose_lanes *)(void *)p = v; }
INLINE lanes all_lanes(float number) { return number - (lanes){0}; } /* subtracting +0 changes nothing, and nothing is subtracted */

/* The first `some` lanes, zero behind them. */
#ifdef LOAD_FEW
#define load_few LOAD_FEW
#define store_few STORE_FEW
#else
TARGET __attribute__((noinline, unused)) static lanes load_few(const float *p, uint32_t some) {
    float numbers[LANES] = {0};
    for (uint32_t m = 0; m < some; ++m)
        numbers[m] = p[m];
    return load_lanes(numbers);
}
TARGET __attribute__((noinline, unused)) static void store_few(float *p, lanes v, uint32_t some) {
    float numbers[LANES];
    store_lanes(numbers, v);
    for (uint32_t m = 0; m < some; ++m)
        p[m] = numbers[m];
}
#endif

/* What vectors compare to is lanes of -1 and 0, where there is nothing better. */
#ifndef LESS
#define LESS(a, b) ((a) < (b))
#define AT_LEAST(a, b) ((a) >= (b))
#define AT_LEAST_INTEGER(a, b) ((a) >= (b))
#define WHERE_NOT(mask, v) (lanes)((ilanes)(v) & ~(mask))
#endif

INLINE lanes load_some(const float *p, uint32_t some) { return some == LANES ? load_lanes(p) : (lanes)load_few(p, some); }
INLINE void store_some(float *p, lanes v, uint32_t some) {
    if (some == LANES)
        store_lanes(p, v);
    else
        store_few(p, v, some);
}

#endif
