// Compressed Convolutional Attention (arXiv 2510.04476), backward; formulas and layout in cca.hpp.
//
//     1. Through RoPE (turned back) and QK-norm: with n = u / |u|, du = temperature sqrt(d) / |u| (g - n (g . n)).
//     2. Grouped convolution: dM_l = sum_t y'_(t-l) du_t^T, dy'_t = sum_l M_l^T du_(t+l) inside the document.
//     3. Depthwise convolution likewise, plus what QK-mean and the values hand to the projection.
//
// y' and its history are made again block by block rather than kept.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cca.hpp"
#include "matrix.hpp"
#include "parallel.hpp"
#include "vector.hpp"

namespace {

// Rows [first, first + rows) of du with each row's successors in its document beside it, 0 where there is none:
// out (rows, heads, kernel1, d), the row itself last.
void gather_future(const Cca &s, const float *du, const int64_t *offset, int64_t first, int64_t rows, float *out) {
    const int64_t channels = s.channels(), heads = s.heads();
    for (int64_t r = 0; r < rows; r++)
        for (int64_t lag = 0; lag < s.kernel1; lag++) {
            const int64_t t = first + r + lag;
            const bool reaches = t < s.tokens && offset[t] >= lag;
            for (int64_t h = 0; h < heads; h++) {
                float *to = out + ((r * heads + h) * s.kernel1 + s.kernel1 - 1 - lag) * s.d;
                if (reaches)
                    memcpy(to, du + t * channels + h * s.d, 4 * s.d);
                else
                    memset(to, 0, 4 * s.d);
            }
        }
}

}  // namespace

extern "C" {

// dtaps0 (kernel0, C), dtaps1 (heads, kernel1, d in, d out), dconstant (C), dtemperature (heads), one after another
// in `dparameters`; partial: (threads, that many) of room; dmixed, dy: (tokens, C) of room.
void cca_backward(int threads, const Cca *shape, const float *projected, const float *taps0, const float *taps1,
                  const float *temperature, const float *cosine, const float *sine, const int64_t *offset,
                  const float *mixed, const float *length, const float *dqueries_keys, const float *dvalues,
                  float *dprojected, float *dmixed, float *dy, float *dparameters, float *partial) {
    const Cca s = *shape;
    const int64_t heads = s.heads(), channels = s.channels(), width = s.width(), d = s.d, half = s.rotary_half;
    const int64_t group = s.query_heads / s.key_heads, taps = s.kernel1 * d;
    const int64_t at_taps1 = s.kernel0 * channels, at_constant = at_taps1 + heads * taps * d;
    const int64_t at_temperature = at_constant + channels, size = at_temperature + heads;
    float *packed = scratch(0, heads * packed_size(taps, d));
    int64_t actual = 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp master
        actual = omp_get_num_threads();
        float *sum = partial + omp_get_thread_num() * size;
        memset(sum, 0, 4 * size);
        float *y = scratch(1, (CCA_ROWS + s.kernel1) * channels);
        float *gathered = scratch(2, CCA_ROWS * channels * s.kernel1);
        float *turned = scratch(3, d);
        float *stacked = scratch(4, taps * d);
        const Share packs(heads);
        for (int64_t h = packs.first; h < packs.last; h++) {
            // (kernel1 * d out, d in): tap by tap transposed.
            for (int64_t l = 0; l < s.kernel1; l++)
                for (int64_t i = 0; i < d; i++)
                    for (int64_t o = 0; o < d; o++)
                        stacked[(l * d + o) * d + i] = taps1[((l * heads + h) * d + i) * d + o];
            pack(stacked, d, 1, taps, d, packed + h * packed_size(taps, d), 0, panels_of(d));
        }
        const Share rows(s.tokens, TILE_ROWS);
        // 1. Through RoPE and QK-norm.
        for (int64_t t = rows.first; t < rows.last; t++) {
            const float *c = cosine + t * half, *n = sine + t * half;
            for (int64_t h = 0; h < heads; h++) {
                const float *gradient = dqueries_keys + t * channels + h * d, *u = mixed + t * channels + h * d;
                float *out = dmixed + t * channels + h * d, *shift = sum + at_constant + h * d;
#pragma omp simd
                for (int64_t i = 0; i < half; i++) {
                    turned[i] = gradient[i] * c[i] + gradient[i + half] * n[i];
                    turned[i + half] = gradient[i + half] * c[i] - gradient[i] * n[i];
                }
                for (int64_t i = 2 * half; i < d; i++) turned[i] = gradient[i];
                const float norm = length[t * heads + h], inverse = 1.0f / std::max(norm, s.epsilon);
                const float along = dot(turned, u, d) * inverse, root = std::sqrt(float(d));
                sum[at_temperature + h] += along * root;
                const float factor = temperature[h] * root * inverse;
                const float back = norm > s.epsilon ? along * inverse : 0.0f;
#pragma omp simd
                for (int64_t i = 0; i < d; i++) {
                    out[i] = factor * (turned[i] - u[i] * back);
                    shift[i] += out[i];
                }
            }
        }
#pragma omp barrier
        // 2. The grouped convolution: gradients of its taps and of its input.
        for (int64_t first = rows.first; first < rows.last; first += CCA_ROWS) {
            const int64_t count = std::min(CCA_ROWS, rows.last - first);
            gather_history(s, projected, taps0, offset, first, count, y, gathered);
            for (int64_t h = 0; h < heads; h++) {
                float *right = scratch(5, packed_size(CCA_ROWS, d));
                pack(dmixed + first * channels + h * d, channels, 1, count, d, right, 0, panels_of(d));
                multiply(taps, d, count, gathered + h * taps, 1, heads * taps, right, sum + at_taps1 + h * taps * d, d,
                         true);
            }
            gather_future(s, dmixed, offset, first, count, gathered);
            for (int64_t h = 0; h < heads; h++)
                multiply(count, d, taps, gathered + h * taps, heads * taps, 1, packed + h * packed_size(taps, d),
                         dy + first * channels + h * d, channels, false);
        }
#pragma omp barrier
        // 3. The depthwise convolution, QK-mean and the values.
        for (int64_t t = rows.first; t < rows.last; t++) {
            const float *z = projected + t * width, *mine = dy + t * channels;
            float *dz = dprojected + t * width;
            for (int64_t lag = 0; lag < s.kernel0; lag++) {
                const float *tap = taps0 + (s.kernel0 - 1 - lag) * channels;
                float *dtap = sum + (s.kernel0 - 1 - lag) * channels;
                if (lag <= offset[t]) {
                    const float *before = z - lag * width;
#pragma omp simd
                    for (int64_t c = 0; c < channels; c++) dtap[c] += before[c] * mine[c];
                }
                const bool reaches = t + lag < s.tokens && offset[t + lag] >= lag;
                const float *later = mine + lag * channels;
                if (lag == 0) {
#pragma omp simd
                    for (int64_t c = 0; c < channels; c++) dz[c] = mine[c] * tap[c];
                } else if (reaches) {
#pragma omp simd
                    for (int64_t c = 0; c < channels; c++) dz[c] += later[c] * tap[c];
                }
            }
            const float *du = dmixed + t * channels;
            const float share = 0.5f / group;
            for (int64_t g = 0; g < s.key_heads; g++) {
                const float *key = du + (s.query_heads + g) * d;
                float *dkey = dz + (s.query_heads + g) * d;
#pragma omp simd
                for (int64_t i = 0; i < d; i++) dkey[i] += 0.5f * key[i];
                for (int64_t h = g * group; h < (g + 1) * group; h++) {
#pragma omp simd
                    for (int64_t i = 0; i < d; i++) {
                        dkey[i] += 0.5f * du[h * d + i];
                        dz[h * d + i] += 0.5f * du[h * d + i] + share * key[i];
                    }
                }
            }
            memcpy(dz + channels, dvalues + t * 2 * s.value_half, 4 * s.value_half);
            if (t + 1 < s.tokens && offset[t + 1] > 0)
                memcpy(dz + channels + s.value_half, dvalues + (t + 1) * 2 * s.value_half + s.value_half,
                       4 * s.value_half);
            else
                memset(dz + channels + s.value_half, 0, 4 * s.value_half);
        }
    }
    add_partials(partial, actual, size, dparameters);
}

}  // extern "C"
