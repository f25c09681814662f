// Linear layer: y = x W^T + bias, and its gradients dx = dy W, dW = dy^T x, dbias = sum over tokens of dy.
//
// x (tokens, in) with rows x_stride apart, w (out, in), bias (out), y and dy (tokens, out); row-major. Threads share
// the panels while W is packed, then tokens (y, dx), then rows of dW.

#pragma once

#include <cstdint>
#include <cstring>

#include "matrix.hpp"
#include "parallel.hpp"

extern "C" {

void linear_forward(int threads, int64_t tokens, int64_t in, int64_t out, const float *x, int64_t x_stride,
                    const float *w, const float *bias, float *y) {
    float *packed = scratch(0, packed_size(in, out));
#pragma omp parallel num_threads(threads)
    {
        const Share panels(panels_of(out));
        pack(w, 1, in, in, out, packed, panels.first, panels.last);
#pragma omp barrier
        const Share rows(tokens, TILE_ROWS);
        float *mine = y + rows.first * out;
        if (bias)
            for (int64_t t = rows.first; t < rows.last; t++) memcpy(y + t * out, bias, 4 * out);
        multiply(rows.last - rows.first, out, in, x + rows.first * x_stride, x_stride, 1, packed, mine, out, bias);
    }
}

// Gradients of x (null: not wanted), w (null: not wanted) and bias (null: none).
void linear_backward(int threads, int64_t tokens, int64_t in, int64_t out, const float *x, int64_t x_stride,
                     const float *w, const float *dy, float *dx, float *dw, float *dbias) {
    float *packed = dx ? scratch(0, packed_size(out, in)) : nullptr;
#pragma omp parallel num_threads(threads)
    {
        if (dx) {
            const Share panels(panels_of(in));
            pack(w, in, 1, out, in, packed, panels.first, panels.last);
#pragma omp barrier
            const Share rows(tokens, TILE_ROWS);
            multiply(rows.last - rows.first, in, out, dy + rows.first * out, out, 1, packed, dx + rows.first * in, in,
                     false);
        }
        const Share mine(out, TILE_ROWS);
        const int64_t count = mine.last - mine.first;
        if (dw && count > 0)
            multiply_over_tokens(tokens, count, in, dy + mine.first, out, x, x_stride, dw + mine.first * in, in);
        if (dbias && count > 0) {
            memset(dbias + mine.first, 0, 4 * count);
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t j = mine.first; j < mine.last; j++) dbias[j] += dy[t * out + j];
        }
    }
}

}  // extern "C"
