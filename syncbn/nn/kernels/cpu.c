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

// A channel's normalization as y = (x - mean) * slope + offset, each an array of `width`. What the mean lost in rounding is
// in the offset: a difference of x and the rounded mean is exact where it is small.
typedef struct {
    float *mean, *slope, *offset, *gain; // gain: of what is added, where something is
    float least; // what y is at least
} Affine;

// The data: n * s positions of c channels. Rows: a position's channels are neighbours. Else a channel's s positions are.
typedef struct {
    int64_t n, c, s;
    int rows, threads;
} Shape;

// The arguments of a pass; which of them it needs is said there. One structure for all, since to convert so many one by
// one would take longer than a small pass. cpu.py packs the same fields in the same order.
typedef struct {
    Shape d;
    int type, flag;
    double eps, number;
    const void *x, *dy;
    void *out;
    double *sums;
    float *statistics; // mean, variance, and what the mean lost in rounding, c numbers each
    const float *weight, *bias;
    float *first, *second;
    int64_t *tracked;
} Pass;

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

// Per-channel factors, in room for four arrays as wide as rows are.
static int allocate(Affine *by, Shape d, int64_t *width) {
    *width = positions_beside(d, MAP_WIDTH) * d.c;
    by->mean = malloc(4 * *width * sizeof(float));
    if (!by->mean) return OUT_OF_MEMORY;
    by->slope = by->mean + *width;
    by->offset = by->slope + *width;
    by->gain = by->offset + *width;
    return 0;
}

static void run_map(int type, const void *z, const void *x, void *y, Affine *by, Shape d, int64_t width) {
    float *arrays[] = {by->mean, by->slope, by->offset, by->gain};
    for (int k = 0; k < (z ? 4 : 3); k++)
        for (int64_t i = d.c; i < width; i++) arrays[k][i] = arrays[k][i - d.c];
    if (type == BFLOAT16) map_bfloat16(z, x, y, by, d);
    else map_float32(z, x, y, by, d);
    free(by->mean);
}

// sums[0] gets the number of values of a channel, sums[1..c] their sums, sums[c+1..2c] the sums of their squares, and the
// last one `number`.
int syncbn_sums(const Pass *p) {
    p->sums[0] = (double)(p->d.n * p->d.s);
    p->sums[2 * p->d.c + 1] = p->number;
    return p->type == BFLOAT16 ? reduce_bfloat16(NULL, p->x, NULL, p->d, p->sums + 1)
                               : reduce_float32(NULL, p->x, NULL, p->d, p->sums + 1);
}

static double mean_of(const double *sums, int64_t i) {
    return sums[0] > 0 ? sums[1 + i] / sums[0] : 0;
}

static double variance_of(const double *sums, int64_t c, int64_t i) {
    const double mean = mean_of(sums, i), square = sums[0] > 0 ? sums[1 + c + i] / sums[0] : 0;
    return square - mean * mean < 0 ? 0 : square - mean * mean; // not a number stays none
}

// The statistics from the sums of all that share a batch.
int syncbn_statistics(const Pass *p) {
    const int64_t c = p->d.c;
    for (int64_t i = 0; i < c; i++) {
        const double exact = mean_of(p->sums, i);
        p->statistics[i] = (float)exact;
        p->statistics[c + i] = (float)variance_of(p->sums, c, i);
        p->statistics[2 * c + i] = (float)(exact - p->statistics[i]);
    }
    return 0;
}

static float between(float old, double batch, double share) { return (float)((1 - share) * old + share * batch); }

// Also moves the running mean and variance, `first` and `second`, by the momentum, `number`: no value moves neither, and
// one value has no variance. With the flag the variance is the biased one. `tracked` may be NULL.
int syncbn_update_running(const Pass *p) {
    const int64_t c = p->d.c;
    const double n = p->sums[0], correction = p->flag ? 1 : n / (n - 1);
    for (int64_t i = 0; i < c; i++) {
        if (n >= 1) p->first[i] = between(p->first[i], mean_of(p->sums, i), p->number);
        if (n >= 2) p->second[i] = between(p->second[i], variance_of(p->sums, c, i) * correction, p->number);
    }
    if (p->tracked && n > 0) *p->tracked += 1;
    return syncbn_statistics(p);
}

// sums[0..c) gets the sums of dy, sums[c..2c) those of dy * xhat; so do `first` and `second`, unless NULL.
int syncbn_gradient_sums(const Pass *p) {
    const int64_t c = p->d.c;
    const float *mean = p->statistics, *var = mean + c, *rest = var + c;
    const int failed = p->type == BFLOAT16 ? reduce_bfloat16(p->dy, p->x, mean, p->d, p->sums)
                                           : reduce_float32(p->dy, p->x, mean, p->d, p->sums);
    for (int64_t i = 0; i < c && !failed; i++) {
        p->sums[c + i] = (p->sums[c + i] - rest[i] * p->sums[i]) / sqrt(var[i] + p->eps);
        if (p->first) p->first[i] = (float)p->sums[i];
        if (p->second) p->second[i] = (float)p->sums[c + i];
    }
    return failed;
}

// out = (x - mean - rest) / sqrt(var + eps) * weight + bias + dy, which is a residual here; with the flag not below 0.
// These three may be NULL.
int syncbn_normalize(const Pass *p) {
    const int64_t c = p->d.c;
    const float *mean = p->statistics, *var = mean + c, *rest = var + c;
    Affine by;
    int64_t width;
    if (allocate(&by, p->d, &width)) return OUT_OF_MEMORY;
    for (int64_t i = 0; i < c; i++) {
        const double slope = (p->weight ? p->weight[i] : 1) / sqrt(var[i] + p->eps);
        by.mean[i] = mean[i];
        by.slope[i] = slope;
        by.offset[i] = (p->bias ? p->bias[i] : 0) - rest[i] * slope;
        by.gain[i] = 1;
    }
    by.least = p->flag ? 0 : -INFINITY;
    run_map(p->type, p->dy, p->x, p->out, &by, p->d, width);
    return 0;
}

// All that comes after the all-reduce: the statistics, the running ones moved by them unless they are NULL, and the values
// normalized, without a ReLU. The flag is that of syncbn_update_running.
int syncbn_finish(const Pass *p) {
    Pass map = *p;
    map.flag = 0;
    if (p->first) syncbn_update_running(p);
    else syncbn_statistics(p);
    return syncbn_normalize(&map);
}

// out = weight * invstd * (dy - sum(dy)/n - xhat * sum(dy*xhat)/n), with the sums of syncbn_gradient_sums over the group
// and their number n, `number`.
int syncbn_input_gradient(const Pass *p) {
    const int64_t c = p->d.c;
    const float *mean = p->statistics, *var = mean + c, *rest = var + c;
    Affine by;
    int64_t width;
    if (allocate(&by, p->d, &width)) return OUT_OF_MEMORY;
    for (int64_t i = 0; i < c; i++) {
        const double invstd = 1 / sqrt(var[i] + p->eps), gain = (p->weight ? p->weight[i] : 1) * invstd;
        const double slope = -gain * invstd * p->sums[c + i] / p->number;
        by.mean[i] = mean[i];
        by.slope[i] = slope;
        by.offset[i] = -gain * p->sums[i] / p->number - rest[i] * slope;
        by.gain[i] = gain;
    }
    by.least = -INFINITY;
    run_map(p->type, p->dy, p->x, p->out, &by, p->d, width);
    return 0;
}
