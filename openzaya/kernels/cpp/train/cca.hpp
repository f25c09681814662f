// Compressed Convolutional Attention (arXiv 2510.04476), forward: from the joint projection to attention's inputs.
//
//     y'_t = sum_l w0_l * z_(t-l)                      depthwise convolution over kernel0 tokens, its bias left out
//     u_t  = sum_l M_l y'_(t-l) + constant + QK-mean   grouped convolution over kernel1 tokens
//     q, k = RoPE(temperature sqrt(d) u / max(|u|, epsilon))
//     v    = [current_t, delayed_(t-1)]
//
// QK-mean of a query head is (own z + its key head's z) / 2, of a key head (own z + mean of its queries' z) / 2.
// What lies before a document is 0: the depthwise bias b0 has moved into constant = b1 + sum_l M_l b0.
//
// projected (tokens, C + 2 * value_half): z, current values, delayed values. C = (query_heads + key_heads) * d, query
// heads first. taps0 (kernel0, C), newest token last; taps1 (kernel1, heads, d in, d out), newest last; constant (C);
// temperature (heads), 1 for query heads; cosine, sine (tokens, rotary_half); offset (tokens): index of a token in its
// document. Kept for the backward pass: mixed (tokens, heads, d), which is u, and length (tokens, heads), which is |u|.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "matrix.hpp"
#include "parallel.hpp"
#include "vector.hpp"

namespace {

struct Cca {
    int64_t tokens, query_heads, key_heads, d, kernel0, kernel1, rotary_half, value_half;
    float epsilon;
    int64_t heads() const { return query_heads + key_heads; }
    int64_t channels() const { return heads() * d; }
    int64_t width() const { return channels() + 2 * value_half; }
};
constexpr int64_t CCA_ROWS = 4 * TILE_ROWS;

// y' of token t: the depthwise convolution without its bias.
inline void depthwise(const Cca &s, const float *projected, const float *taps0, int64_t offset, int64_t t,
                      float *y) {
    const int64_t channels = s.channels(), width = s.width();
    const float *z = projected + t * width, *newest = taps0 + (s.kernel0 - 1) * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) y[c] = z[c] * newest[c];
    for (int64_t lag = 1; lag < s.kernel0 && lag <= offset; lag++) {
        const float *before = z - lag * width, *tap = newest - lag * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) y[c] += before[c] * tap[c];
    }
}

// Rows [first, first + rows) of y' with each row's predecessors beside it: out (rows, heads, kernel1, d), newest last.
void gather_history(const Cca &s, const float *projected, const float *taps0, const int64_t *offset, int64_t first,
                    int64_t rows, float *y, float *out) {
    const int64_t channels = s.channels(), history = s.kernel1 - 1;
    for (int64_t r = -history; r < rows; r++) {
        const int64_t t = first + r;
        if (t >= 0) depthwise(s, projected, taps0, offset[t], t, y + (r + history) * channels);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t lag = 0; lag < s.kernel1; lag++) {
            const float *from = y + (r + history - lag) * channels;
            for (int64_t h = 0; h < s.heads(); h++) {
                float *to = out + ((r * s.heads() + h) * s.kernel1 + s.kernel1 - 1 - lag) * s.d;
                if (lag <= offset[first + r])
                    memcpy(to, from + h * s.d, 4 * s.d);
                else
                    memset(to, 0, 4 * s.d);
            }
        }
}

}  // namespace

extern "C" {

// mixed (tokens, heads, d): before QK-norm, kept for the backward pass; queries_keys: after RoPE; values.
void cca_forward(int threads, const Cca *shape, const float *projected, const float *taps0, const float *taps1,
                 const float *constant, const float *temperature, const float *cosine, const float *sine,
                 const int64_t *offset, float *mixed, float *length, float *queries_keys, float *values) {
    const Cca s = *shape;
    const int64_t heads = s.heads(), channels = s.channels(), width = s.width(), d = s.d, half = s.rotary_half;
    const int64_t group = s.query_heads / s.key_heads, taps = s.kernel1 * d;
    float *packed = scratch(0, heads * packed_size(taps, d));
#pragma omp parallel num_threads(threads)
    {
        const Share packs(heads);
        for (int64_t h = packs.first; h < packs.last; h++) {
            // Head h's taps one below the other: (kernel1 * d in, d out).
            float *stacked = scratch(1, taps * d);
            for (int64_t l = 0; l < s.kernel1; l++)
                memcpy(stacked + l * d * d, taps1 + (l * heads + h) * d * d, 4 * d * d);
            pack(stacked, d, 1, taps, d, packed + h * packed_size(taps, d), 0, panels_of(d));
        }
#pragma omp barrier
        float *y = scratch(1, (CCA_ROWS + s.kernel1) * channels);
        float *history = scratch(2, CCA_ROWS * channels * s.kernel1);
        float *means = scratch(3, s.key_heads * d);
        const Share rows(s.tokens, TILE_ROWS);
        for (int64_t first = rows.first; first < rows.last; first += CCA_ROWS) {
            const int64_t count = std::min(CCA_ROWS, rows.last - first);
            gather_history(s, projected, taps0, offset, first, count, y, history);
            for (int64_t h = 0; h < heads; h++)
                multiply(count, d, taps, history + h * taps, heads * taps, 1, packed + h * packed_size(taps, d),
                         mixed + first * channels + h * d, channels, false);
            for (int64_t t = first; t < first + count; t++) {
                const float *z = projected + t * width, *keys = z + s.query_heads * d;
                float *u = mixed + t * channels, *out = queries_keys + t * channels;
                memset(means, 0, 4 * s.key_heads * d);
                for (int64_t h = 0; h < heads; h++) {
                    const int64_t g = h < s.query_heads ? h / group : h - s.query_heads;
                    const float *own = z + h * d, *key = keys + g * d, *shift = constant + h * d;
                    float *mean = means + g * d, *target = u + h * d;
                    if (h < s.query_heads) {
#pragma omp simd
                        for (int64_t i = 0; i < d; i++) {
                            target[i] += shift[i] + 0.5f * (own[i] + key[i]);
                            mean[i] += own[i];
                        }
                    } else {
                        const float share = 1.0f / group;
#pragma omp simd
                        for (int64_t i = 0; i < d; i++) target[i] += shift[i] + 0.5f * (own[i] + share * mean[i]);
                    }
                    const float norm = std::sqrt(dot(target, target, d));
                    length[t * heads + h] = norm;
                    const float factor = temperature[h] * std::sqrt(float(d)) / std::max(norm, s.epsilon);
                    float *rotated = out + h * d;
                    const float *c = cosine + t * half, *n = sine + t * half;
#pragma omp simd
                    for (int64_t i = 0; i < half; i++) {
                        const float a = target[i] * factor, b = target[i + half] * factor;
                        rotated[i] = a * c[i] - b * n[i];
                        rotated[i + half] = b * c[i] + a * n[i];
                    }
                    for (int64_t i = 2 * half; i < d; i++) rotated[i] = target[i] * factor;
                }
                float *value = values + t * 2 * s.value_half;
                memcpy(value, z + channels, 4 * s.value_half);
                if (offset[t] > 0)
                    memcpy(value + s.value_half, z - width + channels + s.value_half, 4 * s.value_half);
                else
                    memset(value + s.value_half, 0, 4 * s.value_half);
            }
        }
    }
}

}  // extern "C"
