// The passes over the data on the CPU, for syncbn/nn/kernels/cpu.py, which says what each is given.
//
// Sums are taken in double. A product of two floats is exact there, so squares of values far from zero lose nothing,
// and one pass does. Built by hatch_build.py; plain C, so that no version of torch or Python matters.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// The loops are compiled for each of these processors, and the loader takes the best that the machine has.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define PASS __attribute__((target_clones("avx512f", "avx2", "default"), noinline)) static void
#else
#define PASS __attribute__((noinline)) static void
#endif

// Below GRAIN values a second thread costs more than it saves. Rows are made so long by putting positions side by side:
// in the maps for vector instructions, in the reductions until what is added to has left the processor's store queue.
// So many (RUN) products of one plane are added up in float before they go into a double; LINES floats are two cache lines.
enum { GRAIN = 32768, RUN = 256, LINES = 32, MAP_WIDTH = 64, REDUCE_WIDTH = 2048, OUT_OF_MEMORY = 1 };

// A channel's normalization as y = ((x - mean) - rest) * slope + offset, each an array of `width`.
typedef struct {
    float *mean, *rest, *slope, *offset, *gain; // gain: of what is added, where something is
    float least; // what y is at least
} Affine;

// The data: n * s positions of c channels. Rows: a position's channels are neighbours. Else a channel's s positions are.
typedef struct {
    int64_t n, c, s;
    int rows, threads;
} Shape;

static int64_t positions_beside(Shape d, int64_t width) {
    int64_t beside = 1;
    while (d.rows && beside * d.c * 2 <= width && beside * 8 <= d.n * d.s) beside *= 2;
    return beside;
}

static int threads_for(Shape d) { return d.n * d.c * d.s < GRAIN ? 1 : d.threads; }

static float from_bfloat16(uint16_t v) {
    union {
        uint32_t bits;
        float value;
    } u = {(uint32_t)v << 16};
    return u.value;
}

static uint16_t to_bfloat16(float v) { // to the nearest, ties to even; not a number stays none
    union {
        float value;
        uint32_t bits;
    } u = {v};
    uint32_t rounded = (u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16;
    return v != v ? 0x7fc0 : (uint16_t)rounded;
}

#define T float
#define LOAD(v) (v)
#define STORE(v) (v)
#define NAME(name) name##_float32
#include "cpu_passes.h"
#undef T
#undef LOAD
#undef STORE
#undef NAME

#define T uint16_t
#define LOAD(v) from_bfloat16(v)
#define STORE(v) to_bfloat16(v)
#define NAME(name) name##_bfloat16
#include "cpu_passes.h"
#undef T
#undef LOAD
#undef STORE
#undef NAME

enum { FLOAT32, BFLOAT16 };

#ifndef SOURCE
#define SOURCE 0
#endif
// Which sources this was built from, so that an older build is not taken for this one.
uint32_t syncbn_source(void) { return SOURCE; }

// Per-channel factors, in room for five arrays as wide as rows are.
static int allocate(Affine *by, Shape d, int64_t *width) {
    *width = positions_beside(d, MAP_WIDTH) * d.c;
    by->mean = malloc(5 * *width * sizeof(float));
    if (!by->mean) return OUT_OF_MEMORY;
    by->rest = by->mean + *width;
    by->slope = by->rest + *width;
    by->offset = by->slope + *width;
    by->gain = by->offset + *width;
    return 0;
}

static void run_map(int type, const void *z, const void *x, void *y, Affine *by, Shape d, int64_t width) {
    float *arrays[] = {by->mean, by->rest, by->slope, by->offset, by->gain};
    for (int k = 0; k < (z ? 5 : 4); k++)
        for (int64_t i = d.c; i < width; i++) arrays[k][i] = arrays[k][i - d.c];
    if (type == BFLOAT16) map_bfloat16(z, x, y, by, d);
    else map_float32(z, x, y, by, d);
    free(by->mean);
}

// out[0] gets the number of values of a channel, out[1..c] their sums, out[c+1..2c] the sums of their squares, and the
// last one what the rank needs.
int syncbn_sums(int type, const void *x, Shape d, double need, double *out) {
    out[0] = (double)(d.n * d.s);
    out[2 * d.c + 1] = need;
    return type == BFLOAT16 ? reduce_bfloat16(NULL, x, NULL, NULL, d, out + 1)
                            : reduce_float32(NULL, x, NULL, NULL, d, out + 1);
}

static double mean_of(const double *sums, int64_t i) {
    return sums[0] > 0 ? sums[1 + i] / sums[0] : 0;
}

static double variance_of(const double *sums, int64_t c, int64_t i) {
    const double mean = mean_of(sums, i), square = sums[0] > 0 ? sums[1 + c + i] / sums[0] : 0;
    return square - mean * mean < 0 ? 0 : square - mean * mean; // not a number stays none
}

// From the sums of all that share a batch, each with room for c numbers: mean, variance, and what mean lost in rounding.
int syncbn_statistics(const double *sums, int64_t c, float *out) {
    for (int64_t i = 0; i < c; i++) {
        const double exact = mean_of(sums, i);
        out[i] = (float)exact;
        out[c + i] = (float)variance_of(sums, c, i);
        out[2 * c + i] = (float)(exact - out[i]);
    }
    return 0;
}

static float between(float old, double batch, double share) { return (float)((1 - share) * old + share * batch); }

// Also moves the running statistics: no value moves neither, and one value has no variance. `tracked` may be NULL.
int syncbn_update_running(const double *sums, int64_t c, float *running_mean, float *running_var, int64_t *tracked,
                          double momentum, int biased, float *out) {
    const double n = sums[0], correction = biased ? 1 : n / (n - 1);
    for (int64_t i = 0; i < c; i++) {
        if (n >= 1) running_mean[i] = between(running_mean[i], mean_of(sums, i), momentum);
        if (n >= 2) running_var[i] = between(running_var[i], variance_of(sums, c, i) * correction, momentum);
    }
    if (tracked && n > 0) *tracked += 1;
    return syncbn_statistics(sums, c, out);
}

// out[0..c) gets the sums of dy, out[c..2c) those of dy * xhat; so do dbias and dweight, unless NULL.
int syncbn_gradient_sums(int type, const void *dy, const void *x, const float *mean, const float *var,
                         const float *rest, double eps, Shape d, double *out, float *dbias, float *dweight) {
    int failed = type == BFLOAT16 ? reduce_bfloat16(dy, x, mean, rest, d, out) : reduce_float32(dy, x, mean, rest, d, out);
    for (int64_t i = 0; i < d.c && !failed; i++) {
        out[d.c + i] /= sqrt(var[i] + eps);
        if (dbias) dbias[i] = (float)out[i];
        if (dweight) dweight[i] = (float)out[d.c + i];
    }
    return failed;
}

// y = (x - mean - rest) / sqrt(var + eps) * weight + bias + residual, not below 0 with relu; these three may be NULL.
int syncbn_normalize(int type, const void *x, const void *residual, void *y, const float *mean, const float *var,
                     const float *rest, const float *weight, const float *bias, double eps, int relu, Shape d) {
    Affine by;
    int64_t width;
    if (allocate(&by, d, &width)) return OUT_OF_MEMORY;
    for (int64_t i = 0; i < d.c; i++) {
        by.mean[i] = mean[i];
        by.rest[i] = rest[i];
        by.slope[i] = (weight ? weight[i] : 1) / sqrt(var[i] + eps);
        by.offset[i] = bias ? bias[i] : 0;
        by.gain[i] = 1;
    }
    by.least = relu ? 0 : -INFINITY;
    run_map(type, residual, x, y, &by, d, width);
    return 0;
}

// dx = weight * invstd * (dy - sum(dy)/n - xhat * sum(dy*xhat)/n), with the sums of syncbn_gradient_sums over the group.
int syncbn_input_gradient(int type, const void *dy, const void *x, void *dx, const float *mean, const float *var,
                         const float *rest, const float *weight, const double *n, const double *sums, double eps,
                          Shape d) {
    Affine by;
    int64_t width;
    if (allocate(&by, d, &width)) return OUT_OF_MEMORY;
    for (int64_t i = 0; i < d.c; i++) {
        const double invstd = 1 / sqrt(var[i] + eps), gain = (weight ? weight[i] : 1) * invstd;
        by.mean[i] = mean[i];
        by.rest[i] = rest[i];
        by.slope[i] = -gain * invstd * sums[d.c + i] / *n;
        by.offset[i] = -gain * sums[i] / *n;
        by.gain[i] = gain;
    }
    by.least = -INFINITY;
    run_map(type, dy, x, dx, &by, d, width);
    return 0;
}
