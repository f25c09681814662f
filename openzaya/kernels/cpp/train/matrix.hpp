// Matrix products with a packed right-hand matrix, on one thread: what all other kernels are made of.
//
//     c (rows x columns) (+)= a (rows x depth) b (depth x columns)
//
// The right-hand matrix is packed into panels of PANEL columns, [panel][depth][PANEL], the last one padded with
// zeros; TILE_ROWS rows of c times one panel are summed in registers (`tile`). The left-hand matrix is read where it
// lies, element (i, p) at a[i * row_stride + p * column_stride], so that a transposed one costs nothing. The inner
// dimension is taken DEPTH at a time and rows BLOCK_ROWS at a time: what is in use stays in the L2 cache.
//
// The order of a sum depends on its column and on the depth alone: how rows are shared out to threads does not change
// the bits of c.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.hpp"
#include "vector.hpp"

namespace {

constexpr int64_t PANEL = 2 * LANES;  // columns of the register tile, and of a packed panel
constexpr int64_t DEPTH = 512;        // inner dimension taken at a time: what is in use stays in the L2 cache
constexpr int64_t BLOCK_ROWS = 16 * TILE_ROWS;

// One register tile: c (+)= a b over `depth`, a[i * rows + p * columns], b packed.
template <int ROWS>
inline void tile(int64_t depth, const float *a, int64_t row_stride, int64_t column_stride, const float *b, float *c,
                 int64_t c_stride, bool add) {
    Vector sum[ROWS][2];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < 2; j++)
            sum[i][j] = add ? *reinterpret_cast<const Vector *>(c + i * c_stride + LANES * j) : Vector{};
    for (int64_t p = 0; p < depth; p++) {
        const Vector left = *reinterpret_cast<const Vector *>(b + p * PANEL);
        const Vector right = *reinterpret_cast<const Vector *>(b + p * PANEL + LANES);
        for (int i = 0; i < ROWS; i++) {
            const float value = a[i * row_stride + p * column_stride];
            sum[i][0] += value * left;
            sum[i][1] += value * right;
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < 2; j++) *reinterpret_cast<Vector *>(c + i * c_stride + LANES * j) = sum[i][j];
}

template <int ROWS>
inline void tile_of(int64_t rows, int64_t depth, const float *a, int64_t row_stride, int64_t column_stride,
                    const float *b, float *c, int64_t c_stride, bool add) {
    if (rows == ROWS)
        tile<ROWS>(depth, a, row_stride, column_stride, b, c, c_stride, add);
    else if constexpr (ROWS > 1)
        tile_of<ROWS - 1>(rows, depth, a, row_stride, column_stride, b, c, c_stride, add);
}

// Packs b (depth x columns, b[p * row_stride + j * column_stride]) into panels [depth][PANEL], padded with zeros.
// Only panels [first, last) are written.
void pack(const float *b, int64_t row_stride, int64_t column_stride, int64_t depth, int64_t columns, float *packed,
          int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++) {
        float *out = packed + panel * depth * PANEL;
        const float *from = b + panel * PANEL * column_stride;
        const int64_t width = std::min(PANEL, columns - panel * PANEL);
        if (column_stride == 1) {
            for (int64_t p = 0; p < depth; p++) {
                if (width == PANEL)
                    memcpy(out + p * PANEL, from + p * row_stride, 4 * PANEL);
                else
                    for (int64_t j = 0; j < PANEL; j++) out[p * PANEL + j] = j < width ? from[p * row_stride + j] : 0;
            }
            continue;
        }
        for (int64_t start = 0; start < depth; start += 16) {
            const int64_t end = std::min(depth, start + 16);
            for (int64_t j = 0; j < PANEL; j++)
                for (int64_t p = start; p < end; p++)
                    out[p * PANEL + j] = j < width ? from[p * row_stride + j * column_stride] : 0;
        }
    }
}

inline int64_t packed_size(int64_t depth, int64_t columns) { return depth * round_up(columns, PANEL); }
inline int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// c (rows x columns) (+)= a b on one thread; a[i * row_stride + p * column_stride], b packed.
void multiply(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t row_stride, int64_t column_stride,
              const float *b, float *c, int64_t c_stride, bool add) {
    if (depth == 0 && !add)
        for (int64_t i = 0; i < rows; i++) memset(c + i * c_stride, 0, 4 * columns);
    // Rows a multiple of 256 floats apart fall on the same few cache sets: copy them apart.
    const bool copies = column_stride == 1 && row_stride % 256 == 0 && columns > 2 * PANEL;
    for (int64_t p0 = 0; p0 < depth; p0 += DEPTH) {
        const int64_t part = std::min(DEPTH, depth - p0);
        const bool adds = add || p0 > 0;
        for (int64_t i0 = 0; i0 < rows; i0 += BLOCK_ROWS) {
            const int64_t end = std::min(rows, i0 + BLOCK_ROWS);
            const float *block = a + i0 * row_stride + p0 * column_stride;
            int64_t stride = row_stride;
            if (copies) {
                float *copy = scratch(7, BLOCK_ROWS * (DEPTH + 16));
                stride = part + 16;
                for (int64_t i = 0; i < end - i0; i++) memcpy(copy + i * stride, block + i * row_stride, 4 * part);
                block = copy;
            }
            for (int64_t j = 0; j < columns; j += PANEL) {
                const float *panel = b + j * depth + p0 * PANEL;
                const int64_t width = std::min(PANEL, columns - j);
                for (int64_t i = i0; i < end; i += TILE_ROWS) {
                    const int64_t height = std::min<int64_t>(TILE_ROWS, end - i);
                    const float *from = block + (i - i0) * stride;
                    float *out = c + i * c_stride + j;
                    if (width == PANEL) {
                        tile_of<TILE_ROWS>(height, part, from, stride, column_stride, panel, out, c_stride, adds);
                    } else {
                        float edge[TILE_ROWS * PANEL];
                        tile_of<TILE_ROWS>(height, part, from, stride, column_stride, panel, edge, PANEL, false);
                        for (int64_t r = 0; r < height; r++)
                            for (int64_t k = 0; k < width; k++)
                                out[r * c_stride + k] = edge[r * PANEL + k] + (adds ? out[r * c_stride + k] : 0.0f);
                    }
                }
            }
        }
    }
}

// c (rows x columns) = sum over tokens of left[t, rows]^T right[t, columns], on one thread: a weight's gradient.
void multiply_over_tokens(int64_t tokens, int64_t rows, int64_t columns, const float *left, int64_t left_stride,
                          const float *right, int64_t right_stride, float *c, int64_t c_stride) {
    const int64_t step = 256;
    float *packed = scratch(6, packed_size(step, columns));
    if (tokens == 0) multiply(rows, columns, 0, left, 1, left_stride, packed, c, c_stride, false);
    for (int64_t t = 0; t < tokens; t += step) {
        const int64_t part = std::min(step, tokens - t);
        pack(right + t * right_stride, right_stride, 1, part, columns, packed, 0, panels_of(columns));
        multiply(rows, columns, part, left + t * left_stride, 1, left_stride, packed, c, c_stride, t > 0);
    }
}

}  // namespace
