// Included by cpu.c once for each type T of the data, with LOAD and STORE from and to float.

static inline void NAME(ask_for)(const T *x, int64_t c) {
    for (int row = 0; row < 4; row++) {
        __builtin_prefetch(x + row * c);
        __builtin_prefetch(x + row * c + LINES / 2);
    }
}

PASS NAME(plane_sums)(const T *x, int64_t s, double *sum, double *square) {
    double a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
    for (int64_t i = 0; i < s; i++) {
        double v = LOAD(x[i]);
        a += v;
        b += v * v;
    }
    *sum += a;
    *square += b;
}

PASS NAME(plane_gradients)(const T *dy, const T *x, float mean, int64_t s, double *sum, double *product) {
    for (int64_t first = 0; first < s; first += RUN) {
        const int64_t end = first + RUN < s ? first + RUN : s;
        float a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
        for (int64_t i = first; i < end; i++) {
            float v = LOAD(dy[i]);
            a += v;
            b += v * (LOAD(x[i]) - mean);
        }
        *sum += a;
        *product += b;
    }
}

PASS NAME(plane_affine)(const T *x, T *y, float mean, float slope, float offset, float least, int64_t s) {
#pragma omp simd
    for (int64_t i = 0; i < s; i++) {
        const float v = (LOAD(x[i]) - mean) * slope + offset;
        y[i] = STORE(v < least ? least : v); // not a number stays none
    }
}

PASS NAME(plane_affine_sum)(const T *z, const T *x, T *y, float mean, float slope, float offset, float gain, float least,
                            int64_t s) {
#pragma omp simd
    for (int64_t i = 0; i < s; i++) {
        const float v = gain * LOAD(z[i]) + ((LOAD(x[i]) - mean) * slope + offset);
        y[i] = STORE(v < least ? least : v);
    }
}

// Four rows at a time, since what is added to goes through memory. Each four are asked for while the last are added up:
// the processor does not see so many streams coming by itself.
PASS NAME(rows_sums)(const T *x, int64_t rows, int64_t c, double *restrict sum, double *restrict square) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4, x += 4 * c) {
        for (int64_t first = 0; first < c; first += LINES) {
            const int64_t end = first + LINES < c ? first + LINES : c;
            NAME(ask_for)(x + 4 * c + first, c);
#pragma omp simd
            for (int64_t i = first; i < end; i++) {
                double p = LOAD(x[i]), q = LOAD(x[i + c]), t = LOAD(x[i + 2 * c]), u = LOAD(x[i + 3 * c]);
                sum[i] += (p + q) + (t + u);
                square[i] += (p * p + q * q) + (t * t + u * u);
            }
        }
    }
    for (; r < rows; r++, x += c) {
#pragma omp simd
        for (int64_t i = 0; i < c; i++) {
            double v = LOAD(x[i]);
            sum[i] += v;
            square[i] += v * v;
        }
    }
}

PASS NAME(rows_gradients)(const T *dy, const T *x, const float *restrict mean, int64_t rows, int64_t c,
                          double *restrict sum, double *restrict product) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4, x += 4 * c, dy += 4 * c) {
        for (int64_t first = 0; first < c; first += LINES) {
            const int64_t end = first + LINES < c ? first + LINES : c;
            NAME(ask_for)(x + 4 * c + first, c);
            NAME(ask_for)(dy + 4 * c + first, c);
#pragma omp simd
            for (int64_t i = first; i < end; i++) {
                float p = LOAD(dy[i]), q = LOAD(dy[i + c]), t = LOAD(dy[i + 2 * c]), u = LOAD(dy[i + 3 * c]);
                float m = mean[i];
                sum[i] += (p + q) + (t + u);
                product[i] += (p * (LOAD(x[i]) - m) + q * (LOAD(x[i + c]) - m)) +
                              (t * (LOAD(x[i + 2 * c]) - m) + u * (LOAD(x[i + 3 * c]) - m));
            }
        }
    }
    for (; r < rows; r++, x += c, dy += c) {
#pragma omp simd
        for (int64_t i = 0; i < c; i++) {
            float v = LOAD(dy[i]);
            sum[i] += v;
            product[i] += v * (LOAD(x[i]) - mean[i]);
        }
    }
}

PASS NAME(rows_affine)(const T *x, T *y, const Affine *by, int64_t rows, int64_t c) {
    const float *restrict mean = by->mean, *restrict slope = by->slope, *restrict offset = by->offset;
    const float least = by->least;
    for (int64_t r = 0; r < rows; r++, x += c, y += c) {
#pragma omp simd
        for (int64_t i = 0; i < c; i++) {
            const float v = (LOAD(x[i]) - mean[i]) * slope[i] + offset[i];
            y[i] = STORE(v < least ? least : v);
        }
    }
}

PASS NAME(rows_affine_sum)(const T *z, const T *x, T *y, const Affine *by, int64_t rows, int64_t c) {
    const float *restrict mean = by->mean, *restrict slope = by->slope, *restrict offset = by->offset;
    const float *restrict gain = by->gain;
    const float least = by->least;
    for (int64_t r = 0; r < rows; r++, x += c, z += c, y += c) {
#pragma omp simd
        for (int64_t i = 0; i < c; i++) {
            const float v = gain[i] * LOAD(z[i]) + ((LOAD(x[i]) - mean[i]) * slope[i] + offset[i]);
            y[i] = STORE(v < least ? least : v);
        }
    }
}

// out[0..c) gets the sum of x, or of dy; out[c..2c) the sum of x * x, or of dy * (x - mean).
static int NAME(reduce)(const T *dy, const T *x, const float *mean, Shape d, double *out) {
    const int threads = threads_for(d);
    if (!d.rows) {
#pragma omp parallel for num_threads(threads)
        for (int64_t j = 0; j < d.c; j++) {
            double a = 0, b = 0;
            for (int64_t i = 0; i < d.n; i++) {
                const int64_t at = (i * d.c + j) * d.s;
                if (dy) NAME(plane_gradients)(dy + at, x + at, mean[j], d.s, &a, &b);
                else NAME(plane_sums)(x + at, d.s, &a, &b);
            }
            out[j] = a;
            out[d.c + j] = b;
        }
        return 0;
    }
    const int64_t positions = d.n * d.s, beside = positions_beside(d, REDUCE_WIDTH), width = beside * d.c;
    double *sums = calloc((size_t)(2 * threads + 1) * width, sizeof(double));
    if (!sums) return OUT_OF_MEMORY;
    float *means = (float *)(sums + 2 * threads * width);
    for (int64_t i = 0; mean && i < width; i++) means[i] = i < d.c ? mean[i] : means[i - d.c];
#pragma omp parallel for num_threads(threads)
    for (int t = 0; t < threads; t++) {
        const int64_t first = positions * t / threads, count = positions * (t + 1) / threads - first;
        const int64_t rows = count / beside, at = first * d.c, left = at + rows * width;
        double *sum = sums + 2 * t * width;
        if (dy) {
            NAME(rows_gradients)(dy + at, x + at, means, rows, width, sum, sum + width);
            NAME(rows_gradients)(dy + left, x + left, means, count % beside, d.c, sum, sum + width);
        } else {
            NAME(rows_sums)(x + at, rows, width, sum, sum + width);
            NAME(rows_sums)(x + left, count % beside, d.c, sum, sum + width);
        }
    }
    memset(out, 0, 2 * d.c * sizeof(double));
    for (int64_t k = 0; k < 2 * threads * beside; k++) // threads, then sums before products, then positions
        for (int64_t i = 0; i < d.c; i++) out[k / beside % 2 * d.c + i] += sums[k * d.c + i];
    free(sums);
    return 0;
}

// y = (x - mean) * slope + offset, plus gain * z where z is given; at least by->least.
static void NAME(map)(const T *z, const T *x, T *y, const Affine *by, Shape d) {
    const int threads = threads_for(d);
    if (!d.rows) {
#pragma omp parallel for num_threads(threads)
        for (int64_t p = 0; p < d.n * d.c; p++) {
            const int64_t j = p % d.c, at = p * d.s;
            if (z)
                NAME(plane_affine_sum)(z + at, x + at, y + at, by->mean[j], by->slope[j], by->offset[j], by->gain[j],
                                       by->least, d.s);
            else
                NAME(plane_affine)(x + at, y + at, by->mean[j], by->slope[j], by->offset[j], by->least, d.s);
        }
        return;
    }
    const int64_t positions = d.n * d.s, beside = positions_beside(d, MAP_WIDTH), width = beside * d.c;
#pragma omp parallel for num_threads(threads)
    for (int t = 0; t < threads; t++) {
        const int64_t first = positions * t / threads, count = positions * (t + 1) / threads - first;
        const int64_t rows = count / beside, at = first * d.c, left = at + rows * width;
        if (z) {
            NAME(rows_affine_sum)(z + at, x + at, y + at, by, rows, width);
            NAME(rows_affine_sum)(z + left, x + left, y + left, by, count % beside, d.c);
        } else {
            NAME(rows_affine)(x + at, y + at, by, rows, width);
            NAME(rows_affine)(x + left, y + left, by, count % beside, d.c);
        }
    }
}
