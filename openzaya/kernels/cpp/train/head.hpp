// Cross-entropy of a large head, with its gradients in the same pass.
//
//     loss_t = log sum_v exp(E_v . h_t) - E_target_t . h_t,   p_tv = exp(E_v . h_t - log sum)
//     dh_t = scale * sum_v (p_tv - [v = target_t]) E_v,   dE_v = scale * sum_t (p_tv - [v = target_t]) h_t
//
// Logits are made transposed, (vocabulary, tokens): the head is then the left matrix of two products and is never
// repacked for them, and the softmax runs across tokens, a vector lane each. logits: (vocabulary, width) of room, where
// width = tokens rounded up to a multiple of 32. statistics: (threads, 2, width) of room. dhidden (tokens, D), null:
// loss alone; dhidden_partial (threads, tokens, D) of room; dhead (vocabulary, D), overwritten or added to.
// Gradients are those of scale * loss. losses (tokens), unscaled.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "matrix.hpp"
#include "parallel.hpp"
#include "vector.hpp"

extern "C" {

void cross_entropy(int threads, int64_t tokens, int64_t hidden_size, int64_t vocabulary, const float *hidden,
                   const float *head, const int64_t *targets, float scale, float *logits, float *statistics,
                   float *losses, float *dhidden, float *dhidden_partial, float *dhead, int64_t add) {
    const int64_t width = round_up(tokens, 32);
    float *across = scratch(0, packed_size(hidden_size, width)), *down = scratch(1, packed_size(tokens, hidden_size));
    int64_t actual = 1;
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num();
#pragma omp master
        actual = omp_get_num_threads();
        const Share across_panels(panels_of(width)), down_panels(panels_of(hidden_size));
        pack(hidden, 1, hidden_size, hidden_size, tokens, across, across_panels.first,
             std::min(across_panels.last, panels_of(tokens)));
        if (dhidden) pack(hidden, hidden_size, 1, tokens, hidden_size, down, down_panels.first, down_panels.last);
#pragma omp barrier
        const Share rows(vocabulary, BLOCK_ROWS);
        float *maximum = statistics + thread * 2 * width, *sum = maximum + width, *high = scratch(3, width);
        for (int64_t t = 0; t < width; t++) maximum[t] = -3.0e38f, sum[t] = 0;
        for (int64_t v = rows.first; v < rows.last; v += BLOCK_ROWS) {
            const int64_t count = std::min(BLOCK_ROWS, rows.last - v);
            float *block = logits + v * width;
            multiply(count, tokens, hidden_size, head + v * hidden_size, hidden_size, 1, across, block, width, false);
            // Running maximum and sum of exponentials of this thread's part of the vocabulary.
            memcpy(high, maximum, 4 * tokens);
            for (int64_t r = 0; r < count; r++)
#pragma omp simd
                for (int64_t t = 0; t < tokens; t++) high[t] = std::max(high[t], block[r * width + t]);
#pragma omp simd
            for (int64_t t = 0; t < tokens; t++) sum[t] *= exponential(maximum[t] - high[t]);
            for (int64_t r = 0; r < count; r++)
#pragma omp simd
                for (int64_t t = 0; t < tokens; t++) sum[t] += exponential(block[r * width + t] - high[t]);
            memcpy(maximum, high, 4 * tokens);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            float high = -3.0e38f, total = 0;
            for (int64_t k = 0; k < actual; k++) high = std::max(high, statistics[k * 2 * width + t]);
            for (int64_t k = 0; k < actual; k++)
                total += statistics[k * 2 * width + width + t] * exponential(statistics[k * 2 * width + t] - high);
            const float log_sum = high + std::log(total);
            losses[t] = log_sum - logits[targets[t] * width + t];
            statistics[t] = log_sum;  // every thread's maximum of token t has been read
        }
        if (dhidden) {
            float *mine = dhidden_partial + thread * tokens * hidden_size;
            memset(mine, 0, 4 * tokens * hidden_size);
            float *packed = scratch(2, packed_size(BLOCK_ROWS, hidden_size));
            for (int64_t v = rows.first; v < rows.last; v += BLOCK_ROWS) {
                const int64_t count = std::min(BLOCK_ROWS, rows.last - v);
                float *block = logits + v * width;
                for (int64_t r = 0; r < count; r++)
#pragma omp simd
                    for (int64_t t = 0; t < tokens; t++)
                        block[r * width + t] = scale * exponential(block[r * width + t] - statistics[t]);
                for (int64_t t = 0; t < tokens; t++)
                    if (targets[t] >= v && targets[t] < v + count) block[(targets[t] - v) * width + t] -= scale;
                if (dhead)
                    multiply(count, hidden_size, tokens, block, width, 1, down, dhead + v * hidden_size, hidden_size,
                             add != 0);
                pack(head + v * hidden_size, hidden_size, 1, count, hidden_size, packed, 0, panels_of(hidden_size));
                multiply(tokens, hidden_size, count, block, 1, width, packed, mine, hidden_size, true);
            }
#pragma omp barrier
            const Share parts(tokens * hidden_size);
            for (int64_t i = parts.first; i < parts.last; i++) {
                float total = dhidden_partial[i];
                for (int64_t k = 1; k < actual; k++) total += dhidden_partial[k * tokens * hidden_size + i];
                dhidden[i] = total;
            }
        }
    }
}

}  // extern "C"
