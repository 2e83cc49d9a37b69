/* Pillow's resizing of 8-bit levels, only where the cut needs it: a pass along the rows, then one along the columns.
 *
 * Both passes are one sum: (2^21 + sum(weight * level)) / 2^22, rounded down and held to 0..255. Here it is taken for
 * LANES levels at once, in plain loops that a compiler turns into vector instructions. In a row, levels with the same
 * weights do not lie together: so some rows at a time are laid out by columns first (`strip`). The second pass reads
 * the first one's rows from a ring that holds as many as it needs, so a picture's height costs no memory.
 *
 * compiled_resizing.py makes the weights, checks every size and calls `tidegate_resize_1` without the interpreter's
 * lock. Nothing here knows Python, so no headers of it are needed.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* For processors with AVX2 and for all others; the one that runs is chosen when this is loaded. Needs glibc. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define CLONED __attribute__((target_clones("avx2", "default")))
#endif
#endif
#ifndef CLONED
#define CLONED
#endif
#if defined(__GNUC__)
#define INLINED static inline __attribute__((always_inline)) /* else it would be in no clone's instructions */
#else
#define INLINED static inline
#endif

enum { LANES = 32, SHIFT = 22, HALF = 1 << (SHIFT - 1) };

/* Pixel i of `count` is the sum of weights[i * taps + t] times source pixel first[i] + t; `first` never falls. */
typedef struct {
    int32_t count, taps;
    const int32_t *first, *weights;
} axis;

typedef struct {
    uint8_t *strip; /* [columns][LANES]: of some rows, the pixels of each column side by side */
    uint8_t *ring;  /* [kept][line]: row r of the first pass lies in r % kept */
    int32_t kept;
    ptrdiff_t line;
} scratch;

/* LANES sums. `step` bytes lie between an axis's pixels; whatever comes to `end` goes on at `begin`. */
INLINED void weigh(const uint8_t *from, ptrdiff_t step, const uint8_t *begin, const uint8_t *end,
                   const int32_t *weights, int32_t taps, uint8_t *to) {
    int32_t sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = HALF;
    for (int32_t t = 0; t < taps; t++) {
        const int32_t weight = weights[t];
        for (int i = 0; i < LANES; i++) sums[i] += weight * from[i];
        from += step;
        if (from == end) from = begin;
    }
    for (int i = 0; i < LANES; i++) {
        const int32_t level = sums[i] < 0 ? 0 : sums[i] >> SHIFT;
        to[i] = (uint8_t)(level > 255 ? 255 : level);
    }
}

/* The first pass for LANES / room rows from `row` on; behind `last`, that one again. A pixel of three bytes takes
 * `room` for four, so that one instruction moves it: the fourth is its neighbour's, and is overwritten or not read. */
INLINED void along_rows(const uint8_t *source, ptrdiff_t pitch, const int bytes, int32_t row, int32_t last,
                        const axis *x, const scratch *in) {
    const int room = bytes == 3 ? 4 : 1, rows = LANES / room;
    const int32_t begin = x->first[0], columns = x->first[x->count - 1] + x->taps - begin;
    const uint8_t *from[LANES];
    uint8_t *to[LANES], levels[LANES];
    for (int r = 0; r < rows; r++) {
        from[r] = source + pitch * (row + r < last ? row + r : last) + (ptrdiff_t)bytes * begin;
        to[r] = in->ring + in->line * ((row + r) % in->kept);
    }
    for (ptrdiff_t c = 0; c < columns - 1; c++)
        for (int r = 0; r < rows; r++) memcpy(in->strip + LANES * c + room * r, from[r] + bytes * c, room);
    for (ptrdiff_t c = columns - 1, r = 0; r < rows; r++) /* nothing may lie behind these */
        memcpy(in->strip + LANES * c + room * r, from[r] + bytes * c, bytes);
    for (ptrdiff_t i = 0; i < x->count; i++) {
        weigh(in->strip + LANES * (ptrdiff_t)(x->first[i] - begin), LANES, NULL, NULL, x->weights + i * x->taps, x->taps,
              levels);
        for (int r = 0; r < rows; r++) memcpy(to[r] + bytes * i, levels + room * r, room);
    }
}

INLINED void both(const uint8_t *source, ptrdiff_t pitch, const int bytes, const axis *x, const axis *y,
                  const scratch *in, uint8_t *target) {
    const ptrdiff_t width = (ptrdiff_t)bytes * x->count;
    const int32_t last = y->first[y->count - 1] + y->taps - 1;
    int32_t done = y->first[0];
    uint8_t levels[LANES];
    for (int32_t i = 0; i < y->count; i++, target += width) {
        for (; done < y->first[i] + y->taps; done += LANES / (bytes == 3 ? 4 : 1))
            along_rows(source, pitch, bytes, done, last, x, in);
        const uint8_t *from = in->ring + in->line * (y->first[i] % in->kept);
        for (ptrdiff_t at = 0; at < width; at += LANES) {
            weigh(from + at, in->line, in->ring + at, in->ring + at + in->line * in->kept,
                  y->weights + (ptrdiff_t)i * y->taps, y->taps, levels);
            memcpy(target + at, levels, width - at < LANES ? width - at : LANES);
        }
    }
}

CLONED static void either(const uint8_t *source, ptrdiff_t pitch, int32_t bytes, const axis *x, const axis *y,
                          const scratch *in, uint8_t *target) {
    if (bytes == 3) /* each of both compiled for its own number */
        both(source, pitch, 3, x, y, in, target);
    else
        both(source, pitch, 1, x, y, in, target);
}

/* `source` is the picture's first pixel, its rows `pitch` bytes apart, its pixels of 1 or 3 `bytes`; `target` takes
 * height * width pixels. Gives 0, or -1 where there is no memory. The name's number changes with the arguments, so that
 * a build that an older source left behind is not called. */
int tidegate_resize_1(const uint8_t *source, ptrdiff_t pitch, int32_t bytes, int32_t width, int32_t taps_x,
                      const int32_t *first_x, const int32_t *weights_x, int32_t height, int32_t taps_y,
                      const int32_t *first_y, const int32_t *weights_y, uint8_t *target) {
    const axis x = {width, taps_x, first_x, weights_x}, y = {height, taps_y, first_y, weights_y};
    const ptrdiff_t columns = (ptrdiff_t)first_x[width - 1] + taps_x - first_x[0];
    const ptrdiff_t line = ((ptrdiff_t)bytes * width / LANES + 1) * LANES; /* at least one byte to spare */
    const int32_t kept = taps_y + LANES;
    uint8_t *memory = calloc((size_t)(LANES * columns + line * kept), 1);
    if (memory == NULL) return -1;
    const scratch in = {memory, memory + LANES * columns, kept, line};
    either(source, pitch, bytes, &x, &y, &in, target);
    free(memory);
    return 0;
}
