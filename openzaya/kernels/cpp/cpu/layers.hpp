// What happens to each token by itself: norms, residual merges, activation functions, CCA's mixing, RoPE.
#pragma once

#include <cmath>

#include "attention.hpp"

namespace oz {

// In 16 partial sums.
inline float sum_of_squares(const float* x, int64_t n) {
    Floats total = all(0);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) total = fma(load(x + i), load(x + i), total);
    if (i < n) {
        Floats rest = load_first(x + i, int(n - i));
        total = fma(rest, rest, total);
    }
    return sum(total);
}

inline void rms_norm(const float* x, const float* weight, int64_t n, float epsilon, float* __restrict to) {
    const float inverse = 1.0f / std::sqrt(sum_of_squares(x, n) / float(n) + epsilon);
    for (int64_t i = 0; i < n; i++) to[i] = x[i] * inverse * weight[i];
}

// x <- (y * gate + b_h) * a_h + (x + b_r) * a_r; y null: nothing comes from the block, as from the skip class.
inline void merge(float* __restrict x, const float* y, float gate, const float* scale, const float* bias,
                  const float* residual_scale, const float* residual_bias, int64_t n) {
    if (y)
        for (int64_t i = 0; i < n; i++)
            x[i] = (y[i] * gate + bias[i]) * scale[i] + (x[i] + residual_bias[i]) * residual_scale[i];
    else
        for (int64_t i = 0; i < n; i++) x[i] = bias[i] * scale[i] + (x[i] + residual_bias[i]) * residual_scale[i];
}

inline void gelu(float* x, const float* bias, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float v = x[i] + bias[i];
        x[i] = 0.5f * v * (1.0f + error_function(v * 0.707106781f));
    }
}

// gate <- silu(gate) * up
inline void gated(float* gate, const float* up, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        const int count = int(std::min(LANES, n - i));
        const Floats x = load_first(gate + i, count);
        store_first(gate + i, x / (all(1) + exponentials(x * all(-1))) * load_first(up + i, count), count);
    }
}

inline void rotate(float* x, const float* cosine, const float* sine, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[half + i];
        x[i] = a * cosine[i] - b * sine[i];
        x[half + i] = b * cosine[i] + a * sine[i];
    }
}

// Where a row of the embedding begins; converted to fp32.
inline void embedding_row(const Matrix& m, int64_t row, float* to) {
    if (m.format == FLOAT32) {
        std::memcpy(to, m.data + row * m.columns * 4, size_t(m.columns) * 4);
    } else {
        const bf16* from = (const bf16*)m.data + row * m.columns;
        for (int64_t i = 0; i < m.columns; i++) to[i] = to_float(from[i]);
    }
}

}  // namespace oz
