// Causal attention inside documents, with grouped key heads and an optional sliding window.
//
//     output_t = sum_s p_ts v_s,   p_ts = exp(q_t . k_s / sqrt(d) - log_sum_t)   over t - window < s <= t of a document
//     dv_s = sum_t p_ts g_t,   dq_t = sum_s e_ts k_s,   dk_s = sum_t e_ts q_t,
//     e_ts = p_ts (g_t . v_s - g_t . output_t) / sqrt(d),   g the output's gradient
//
// A document and key head is one piece of work, so nothing is shared between threads. QUERY_ROWS queries are taken at
// a time against all keys they may see; scores live in the cache and are made again in the backward pass.
//
// queries_keys (tokens, query_heads + key_heads, d), values (tokens, key_heads, d), output (tokens, query_heads, d),
// log_sums (query_heads, tokens), starts (documents + 1): first token of each document, then the number of tokens.
// window: how many keys a query may see, itself included; the document's length or more where all.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "matrix.hpp"
#include "parallel.hpp"
#include "vector.hpp"

namespace {

constexpr int64_t QUERY_ROWS = 2 * TILE_ROWS;

struct Piece {
    int64_t first, length, key_head;
};

Piece piece_of(int64_t index, int64_t key_heads, const int64_t *starts) {
    const int64_t document = index / key_heads;
    return {starts[document], starts[document + 1] - starts[document], index % key_heads};
}

}  // namespace

extern "C" {

void attention_forward(int threads, int64_t tokens, int64_t documents, int64_t query_heads, int64_t key_heads,
                       int64_t d, int64_t window, const int64_t *starts, const float *queries_keys,
                       const float *values, float *output, float *log_sums) {
    const int64_t heads = query_heads + key_heads, group = query_heads / key_heads, wide = heads * d;
    const float scale = 1.0f / std::sqrt(float(d));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t index = 0; index < documents * key_heads; index++) {
        const Piece piece = piece_of(index, key_heads, starts);
        const int64_t length = piece.length, padded = round_up(length, PANEL);
        const float *keys = queries_keys + piece.first * wide + (query_heads + piece.key_head) * d;
        float *packed_keys = scratch(0, packed_size(d, length));
        float *packed_values = scratch(1, packed_size(length, d));
        float *scores = scratch(2, QUERY_ROWS * padded);
        pack(keys, 1, wide, d, length, packed_keys, 0, panels_of(length));
        pack(values + (piece.first * key_heads + piece.key_head) * d, key_heads * d, 1, length, d, packed_values, 0,
             panels_of(d));
        for (int64_t h = piece.key_head * group; h < (piece.key_head + 1) * group; h++)
            for (int64_t row = 0; row < length; row += QUERY_ROWS) {
                const int64_t rows = std::min(QUERY_ROWS, length - row), end = row + rows;
                const int64_t from = std::max<int64_t>(0, row - window + 1) / PANEL * PANEL;
                const float *queries = queries_keys + (piece.first + row) * wide + h * d;
                float *out = output + (piece.first + row) * query_heads * d + h * d;
                multiply(rows, round_up(end - from, PANEL), d, queries, wide, 1, packed_keys + from * d, scores,
                         padded, false);
                for (int64_t r = 0; r < rows; r++) {
                    float *score = scores + r * padded;
                    const int64_t low = std::max<int64_t>(0, row + r - window + 1) - from, high = row + r + 1 - from;
                    float maximum = score[high - 1], sum = 0;
#pragma omp simd reduction(max : maximum)
                    for (int64_t j = low; j < high; j++) maximum = std::max(maximum, score[j]);
#pragma omp simd reduction(+ : sum)
                    for (int64_t j = low; j < high; j++) {
                        score[j] = exponential((score[j] - maximum) * scale);
                        sum += score[j];
                    }
                    for (int64_t j = 0; j < low; j++) score[j] = 0;
                    for (int64_t j = high; j < end - from; j++) score[j] = 0;
                    const float inverse = 1.0f / sum;
#pragma omp simd
                    for (int64_t j = low; j < high; j++) score[j] *= inverse;
                    log_sums[h * tokens + piece.first + row + r] = maximum * scale + std::log(sum);
                }
                // The panels of values hold all of the document: step to row `from` in each of them.
                for (int64_t j = 0; j < d; j += PANEL) {
                    const float *panel = packed_values + j * length + from * PANEL;
                    multiply(rows, std::min(PANEL, d - j), end - from, scores, padded, 1, panel, out + j,
                             query_heads * d, false);
                }
            }
    }
}

void attention_backward(int threads, int64_t tokens, int64_t documents, int64_t query_heads, int64_t key_heads,
                        int64_t d, int64_t window, const int64_t *starts, const float *queries_keys,
                        const float *values, const float *output, const float *log_sums, const float *doutput,
                        float *dqueries_keys, float *dvalues) {
    const int64_t heads = query_heads + key_heads, group = query_heads / key_heads, wide = heads * d;
    const int64_t query_wide = query_heads * d, key_wide = key_heads * d;
    const float scale = 1.0f / std::sqrt(float(d));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t index = 0; index < documents * key_heads; index++) {
        const Piece piece = piece_of(index, key_heads, starts);
        const int64_t length = piece.length, padded = round_up(length, PANEL), columns = panels_of(length);
        const float *keys = queries_keys + piece.first * wide + (query_heads + piece.key_head) * d;
        const float *value = values + piece.first * key_wide + piece.key_head * d;
        float *keys_across = scratch(0, packed_size(d, length)), *values_across = scratch(1, packed_size(d, length));
        float *keys_down = scratch(2, packed_size(length, d)), *rows_packed = scratch(3, packed_size(QUERY_ROWS, d));
        float *scores = scratch(4, QUERY_ROWS * padded), *dscores = scratch(5, QUERY_ROWS * padded);
        pack(keys, 1, wide, d, length, keys_across, 0, columns);
        pack(value, 1, key_wide, d, length, values_across, 0, columns);
        pack(keys, wide, 1, length, d, keys_down, 0, panels_of(d));
        float *dkeys = dqueries_keys + piece.first * wide + (query_heads + piece.key_head) * d;
        float *dvalue = dvalues + piece.first * key_wide + piece.key_head * d;
        for (int64_t t = 0; t < length; t++) {
            memset(dkeys + t * wide, 0, 4 * d);
            memset(dvalue + t * key_wide, 0, 4 * d);
        }
        for (int64_t h = piece.key_head * group; h < (piece.key_head + 1) * group; h++)
            for (int64_t row = 0; row < length; row += QUERY_ROWS) {
                const int64_t rows = std::min(QUERY_ROWS, length - row), end = row + rows;
                const int64_t from = std::max<int64_t>(0, row - window + 1) / PANEL * PANEL, span = end - from;
                const float *queries = queries_keys + (piece.first + row) * wide + h * d;
                const float *gradient = doutput + (piece.first + row) * query_wide + h * d;
                const float *out = output + (piece.first + row) * query_wide + h * d;
                multiply(rows, round_up(span, PANEL), d, queries, wide, 1, keys_across + from * d, scores, padded,
                         false);
                multiply(rows, round_up(span, PANEL), d, gradient, query_wide, 1, values_across + from * d, dscores,
                         padded, false);
                for (int64_t r = 0; r < rows; r++) {
                    float *score = scores + r * padded, *dscore = dscores + r * padded;
                    const int64_t low = std::max<int64_t>(0, row + r - window + 1) - from, high = row + r + 1 - from;
                    const float log_sum = log_sums[h * tokens + piece.first + row + r];
                    const float mean = dot(gradient + r * query_wide, out + r * query_wide, d);
                    for (int64_t j = 0; j < low; j++) score[j] = dscore[j] = 0;
#pragma omp simd
                    for (int64_t j = low; j < high; j++) {
                        score[j] = exponential(score[j] * scale - log_sum);
                        dscore[j] = score[j] * (dscore[j] - mean) * scale;
                    }
                    for (int64_t j = high; j < span; j++) score[j] = dscore[j] = 0;
                }
                pack(gradient, query_wide, 1, rows, d, rows_packed, 0, panels_of(d));
                multiply(span, d, rows, scores, 1, padded, rows_packed, dvalue + from * key_wide, key_wide, true);
                pack(queries, wide, 1, rows, d, rows_packed, 0, panels_of(d));
                multiply(span, d, rows, dscores, 1, padded, rows_packed, dkeys + from * wide, wide, true);
                for (int64_t j = 0; j < d; j += PANEL)
                    multiply(rows, std::min(PANEL, d - j), span, dscores, padded, 1,
                             keys_down + j * length + from * PANEL,
                             dqueries_keys + (piece.first + row) * wide + h * d + j, wide, false);
            }
    }
}

}  // extern "C"
