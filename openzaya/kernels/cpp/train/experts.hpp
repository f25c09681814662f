// The experts: y = gate * W2_e (silu(g) * u), [g, u] = W1_e x, each token through the one expert it chose.
//
// order (visits): tokens sorted by expert; ends (experts): end of each expert's run. w1 (experts, 2F, D), w2 (experts,
// D, F). gate_up (visits, 2F), in sorted order, is kept for the backward pass. Rows of y that no expert writes stay.
// F is called `inner` and D `hidden`.
//
// All experts' weights are packed first; then threads share the visits, EXPERT_ROWS of one expert at a time. Gradients
// of weights are cut into EXPERT_ROWS rows of one expert's matrix, so that a popular expert does not keep one thread
// busy alone; which thread takes a piece does not change its bits.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "matrix.hpp"
#include "parallel.hpp"
#include "vector.hpp"

namespace {

constexpr int64_t EXPERT_ROWS = 8 * TILE_ROWS;

int64_t expert_of(int64_t row, const int64_t *ends) {
    int64_t expert = 0;
    while (ends[expert] <= row) expert++;
    return expert;
}

}  // namespace

extern "C" {

void experts_forward(int threads, int64_t experts, int64_t hidden, int64_t inner, int64_t visits, const int64_t *order,
                     const int64_t *ends, const float *x, const float *gate, const float *w1, const float *w2,
                     float *y, float *gate_up) {
    const int64_t size1 = packed_size(hidden, 2 * inner), size2 = packed_size(inner, hidden);
    float *packed1 = scratch(0, experts * size1), *packed2 = scratch(1, experts * size2);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t e = 0; e < experts; e++) {
            pack(w1 + e * 2 * inner * hidden, 1, hidden, hidden, 2 * inner, packed1 + e * size1, 0,
                 panels_of(2 * inner));
            pack(w2 + e * hidden * inner, 1, inner, inner, hidden, packed2 + e * size2, 0, panels_of(hidden));
        }
        float *rows = scratch(2, EXPERT_ROWS * hidden), *inside = scratch(3, EXPERT_ROWS * inner);
        const Share share(visits, TILE_ROWS);
        for (int64_t first = share.first; first < share.last;) {
            const int64_t e = expert_of(first, ends), last = std::min({first + EXPERT_ROWS, ends[e], share.last});
            const int64_t count = last - first;
            for (int64_t r = 0; r < count; r++) memcpy(rows + r * hidden, x + order[first + r] * hidden, 4 * hidden);
            float *both = gate_up + first * 2 * inner;
            multiply(count, 2 * inner, hidden, rows, hidden, 1, packed1 + e * size1, both, 2 * inner, false);
            for (int64_t r = 0; r < count; r++) {
                const float *g = both + r * 2 * inner, *u = g + inner;
                const float weight = gate[order[first + r]];
#pragma omp simd
                for (int64_t j = 0; j < inner; j++)
                    inside[r * inner + j] = weight * u[j] * g[j] / (1.0f + exponential(-g[j]));
            }
            multiply(count, hidden, inner, inside, inner, 1, packed2 + e * size2, rows, hidden, false);
            for (int64_t r = 0; r < count; r++) memcpy(y + order[first + r] * hidden, rows + r * hidden, 4 * hidden);
            first = last;
        }
    }
}

// dx (tokens, D) and dgate (tokens) are written at visited tokens only. room: (visits, 2 D + 3 F).
void experts_backward(int threads, int64_t experts, int64_t hidden, int64_t inner, int64_t visits,
                      const int64_t *order, const int64_t *ends, const float *x, const float *gate, const float *w1,
                      const float *w2, const float *gate_up, const float *dy, float *dx, float *dgate, float *dw1,
                      float *dw2, float *room) {
    const int64_t size1 = packed_size(2 * inner, hidden), size2 = packed_size(hidden, inner);
    float *packed1 = scratch(0, experts * size1), *packed2 = scratch(1, experts * size2);
    float *sorted_x = room, *sorted_dy = sorted_x + visits * hidden, *dgate_up = sorted_dy + visits * hidden;
    float *inside = dgate_up + visits * 2 * inner;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t e = 0; e < experts; e++) {
            pack(w1 + e * 2 * inner * hidden, hidden, 1, 2 * inner, hidden, packed1 + e * size1, 0, panels_of(hidden));
            pack(w2 + e * hidden * inner, inner, 1, hidden, inner, packed2 + e * size2, 0, panels_of(inner));
        }
        float *rows = scratch(2, EXPERT_ROWS * hidden), *dinside = scratch(3, EXPERT_ROWS * inner);
        const Share share(visits, TILE_ROWS);
        for (int64_t first = share.first; first < share.last;) {
            const int64_t e = expert_of(first, ends), last = std::min({first + EXPERT_ROWS, ends[e], share.last});
            const int64_t count = last - first;
            for (int64_t r = first; r < last; r++) {
                memcpy(sorted_x + r * hidden, x + order[r] * hidden, 4 * hidden);
                memcpy(sorted_dy + r * hidden, dy + order[r] * hidden, 4 * hidden);
            }
            multiply(count, inner, hidden, sorted_dy + first * hidden, hidden, 1, packed2 + e * size2, dinside, inner,
                     false);
            for (int64_t r = 0; r < count; r++) {
                const float *g = gate_up + (first + r) * 2 * inner, *u = g + inner, *d_inside = dinside + r * inner;
                float *dg = dgate_up + (first + r) * 2 * inner, *du = dg + inner, *kept = inside + (first + r) * inner;
                const float weight = gate[order[first + r]];
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < inner; j++) {
                    const float sigmoid = 1.0f / (1.0f + exponential(-g[j])), silu = g[j] * sigmoid;
                    const float gradient = d_inside[j] * weight;
                    sum += d_inside[j] * silu * u[j];
                    kept[j] = weight * silu * u[j];
                    du[j] = gradient * silu;
                    dg[j] = gradient * u[j] * sigmoid * (1.0f + g[j] * (1.0f - sigmoid));
                }
                dgate[order[first + r]] = sum;
            }
            multiply(count, hidden, 2 * inner, dgate_up + first * 2 * inner, 2 * inner, 1, packed1 + e * size1, rows,
                     hidden, false);
            for (int64_t r = 0; r < count; r++) memcpy(dx + order[first + r] * hidden, rows + r * hidden, 4 * hidden);
            first = last;
        }
#pragma omp barrier
        const int64_t chunks1 = (2 * inner + EXPERT_ROWS - 1) / EXPERT_ROWS;
        const int64_t chunks2 = (hidden + EXPERT_ROWS - 1) / EXPERT_ROWS, chunks = chunks1 + chunks2;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < experts * chunks; task++) {
            const int64_t e = task / chunks, chunk = task % chunks;
            const int64_t begin = e ? ends[e - 1] : 0, tokens = ends[e] - begin;
            if (chunk < chunks1) {
                const int64_t row = chunk * EXPERT_ROWS, count = std::min(EXPERT_ROWS, 2 * inner - row);
                multiply_over_tokens(tokens, count, hidden, dgate_up + begin * 2 * inner + row, 2 * inner,
                                     sorted_x + begin * hidden, hidden, dw1 + (e * 2 * inner + row) * hidden, hidden);
            } else {
                const int64_t row = (chunk - chunks1) * EXPERT_ROWS, count = std::min(EXPERT_ROWS, hidden - row);
                multiply_over_tokens(tokens, count, inner, sorted_dy + begin * hidden + row, hidden,
                                     inside + begin * inner, inner, dw2 + (e * hidden + row) * inner, inner);
            }
        }
    }
}

}  // extern "C"
