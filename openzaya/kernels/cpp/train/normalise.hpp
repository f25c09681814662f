// RMSNorm and the learned residual merge: a pass over the tokens, shared out to the threads.
//
// RMSNorm   y = x / rms(x) * w,  rms(x)^2 = mean(x^2) + epsilon;  with r = 1 / rms(x), which the forward pass keeps,
//           dx = r (dy w - x r^2 mean(dy w x)),  dw = sum over tokens of dy x r
// Merge     y = (o + bias_o) * scale_o + (x + bias_x) * scale_x
//
// x, o, y and their gradients are (tokens, size), row-major; w, scales and biases are (size).

#pragma once

#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "parallel.hpp"
#include "vector.hpp"

extern "C" {

void norm_forward(int threads, int64_t tokens, int64_t size, float epsilon, const float *x, const float *w, float *y,
                  float *inverse_rms) {
#pragma omp parallel num_threads(threads)
    {
        const Share rows(tokens);
        for (int64_t t = rows.first; t < rows.last; t++) {
            const float *from = x + t * size;
            const float inverse = 1.0f / std::sqrt(dot(from, from, size) / size + epsilon);
            inverse_rms[t] = inverse;
#pragma omp simd
            for (int64_t j = 0; j < size; j++) y[t * size + j] = from[j] * inverse * w[j];
        }
    }
}

// dw_partial: (threads, size) of room.
void norm_backward(int threads, int64_t tokens, int64_t size, const float *x, const float *w, const float *inverse_rms,
                   const float *dy, float *dx, float *dw, float *dw_partial) {
    int64_t actual = 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp master
        actual = omp_get_num_threads();
        float *sum = dw_partial + omp_get_thread_num() * size;
        memset(sum, 0, 4 * size);
        const Share rows(tokens);
        for (int64_t t = rows.first; t < rows.last; t++) {
            const float *from = x + t * size, *gradient = dy + t * size;
            const float inverse = inverse_rms[t];
            float mean = 0;
#pragma omp simd reduction(+ : mean)
            for (int64_t j = 0; j < size; j++) {
                mean += gradient[j] * w[j] * from[j];
                sum[j] += gradient[j] * from[j] * inverse;
            }
            mean *= inverse * inverse / size;
#pragma omp simd
            for (int64_t j = 0; j < size; j++)
                dx[t * size + j] = inverse * (gradient[j] * w[j] - from[j] * mean);
        }
    }
    add_partials(dw_partial, actual, size, dw);
}

void merge_forward(int threads, int64_t tokens, int64_t size, const float *o, const float *x, const float *scale_o,
                   const float *bias_o, const float *scale_x, const float *bias_x, float *y) {
#pragma omp parallel num_threads(threads)
    {
        const Share rows(tokens);
        for (int64_t t = rows.first; t < rows.last; t++)
#pragma omp simd
            for (int64_t j = 0; j < size; j++)
                y[t * size + j] =
                    (o[t * size + j] + bias_o[j]) * scale_o[j] + (x[t * size + j] + bias_x[j]) * scale_x[j];
    }
}

// dvectors: (4, size), gradients of scale_o, bias_o, scale_x, bias_x; partial: (threads, 4, size) of room.
void merge_backward(int threads, int64_t tokens, int64_t size, const float *o, const float *x, const float *scale_o,
                    const float *bias_o, const float *scale_x, const float *bias_x, const float *dy, float *d_o,
                    float *dx, float *dvectors, float *partial) {
    int64_t actual = 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp master
        actual = omp_get_num_threads();
        float *sum = partial + omp_get_thread_num() * 4 * size;
        float *sum_o = sum, *sum_y = sum + size, *sum_x = sum + 2 * size;
        memset(sum, 0, 16 * size);
        const Share rows(tokens);
        for (int64_t t = rows.first; t < rows.last; t++)
#pragma omp simd
            for (int64_t j = 0; j < size; j++) {
                const int64_t at = t * size + j;
                const float gradient = dy[at];
                sum_o[j] += gradient * (o[at] + bias_o[j]);
                sum_x[j] += gradient * (x[at] + bias_x[j]);
                sum_y[j] += gradient;
                d_o[at] = gradient * scale_o[j];
                dx[at] = gradient * scale_x[j];
            }
    }
    add_partials(partial, actual, 4 * size, dvectors);
    float *d_bias_o = dvectors + size, *d_bias_x = dvectors + 3 * size;
    for (int64_t j = 0; j < size; j++) {
        d_bias_x[j] = d_bias_o[j] * scale_x[j];
        d_bias_o[j] *= scale_o[j];
    }
}

}  // extern "C"
