// Fused fp32 training kernels for one machine's CPU: plain C functions, called from functions.py.
//
// What is here: products with a packed right-hand matrix; RMSNorm; the learned residual merge; the mixing of
// queries and keys in Compressed Convolutional Attention (arXiv 2510.04476); causal attention inside documents;
// the experts; the cross-entropy of a large head. Each has its twin in plain PyTorch, which says what is computed.
//
// Everything is row-major and dense unless a stride is passed. Work is cut by thread number in a fixed way and
// partial sums are added in thread order, so the same inputs and number of threads give the same bits. Threads are
// torch's own OpenMP pool (build.py links no OpenMP library of its own).

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 12;
#elif defined(__AVX2__)
constexpr int LANES = 8, TILE_ROWS = 6;
#else
constexpr int LANES = 4, TILE_ROWS = 6;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
constexpr int64_t PANEL = 2 * LANES;  // columns of the register tile, and of a packed panel
constexpr int64_t DEPTH = 512;        // inner dimension taken at a time: what is in use stays in the L2 cache
constexpr int64_t BLOCK_ROWS = 16 * TILE_ROWS;

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Memory of one thread that only grows, so that no call pays for fresh pages. `slot` tells apart what is in use at once.
float *scratch(int slot, int64_t floats) {
    struct Buffers {
        float *data[8] = {};
        int64_t size[8] = {};
        ~Buffers() {
            for (float *buffer : data) free(buffer);
        }
    };
    static thread_local Buffers buffers;
    if (buffers.size[slot] < floats) {
        free(buffers.data[slot]);
        buffers.size[slot] = round_up(floats, 1024);
        buffers.data[slot] = static_cast<float *>(aligned_alloc(64, 4 * buffers.size[slot]));
        if (!buffers.data[slot]) abort();
    }
    return buffers.data[slot];
}

// The part [first, last) of `count` items that belongs to this thread, cut at multiples of `unit`.
struct Share {
    int64_t first, last;
    Share(int64_t count, int64_t unit = 1) {
        const int64_t units = (count + unit - 1) / unit, threads = omp_get_num_threads(), thread = omp_get_thread_num();
        first = std::min(count, units * thread / threads * unit);
        last = std::min(count, units * (thread + 1) / threads * unit);
    }
};

// e^x to 1e-7 relative; below -87 it stays at e^-87.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

// --- matrix products ------------------------------------------------------------------------------------------

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

// out[i] = sum over threads of partial[thread][i], in thread order.
void add_partials(const float *partial, int64_t threads, int64_t size, float *out) {
    for (int64_t i = 0; i < size; i++) out[i] = partial[i];
    for (int64_t thread = 1; thread < threads; thread++)
        for (int64_t i = 0; i < size; i++) out[i] += partial[thread * size + i];
}

inline float dot(const float *a, const float *b, int64_t size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += a[i] * b[i];
    return sum;
}

}  // namespace

extern "C" {

// --- linear: y = x w^T + bias ------------------------------------------------------------------------------------

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

// --- RMSNorm: y = x / rms(x) * w ---------------------------------------------------------------------------------

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

// --- residual merge: y = (o + bias_o) * scale_o + (x + bias_x) * scale_x -----------------------------------------

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

// --- CCA: convolutions, QK-mean, QK-norm, RoPE, value shift --------------------------------------------------------
//
// projected (tokens, C + 2 * value_half): z, current values, delayed values. C = (query_heads + key_heads) * d.
// taps0 (kernel0, C), newest token last; taps1 (kernel1, heads, d in, d out), newest last; constant (C);
// temperature (heads), 1 for query heads; offset (tokens): index of a token in its document.

struct Cca {
    int64_t tokens, query_heads, key_heads, d, kernel0, kernel1, rotary_half, value_half;
    float epsilon;
    int64_t heads() const { return query_heads + key_heads; }
    int64_t channels() const { return heads() * d; }
    int64_t width() const { return channels() + 2 * value_half; }
};
constexpr int64_t CCA_ROWS = 4 * TILE_ROWS;

// y' of token t: the depthwise convolution without its bias.
static inline void depthwise(const Cca &s, const float *projected, const float *taps0, int64_t offset, int64_t t,
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
static void gather_history(const Cca &s, const float *projected, const float *taps0, const int64_t *offset,
                           int64_t first, int64_t rows, float *y, float *out) {
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

// dtaps0 (kernel0, C), dtaps1 (heads, kernel1, d in, d out), dconstant (C), dtemperature (heads), one after another
// in `dparameters`; partial: (threads, that many) of room; dmixed, dy: (tokens, C) of room.
void cca_backward(int threads, const Cca *shape, const float *projected, const float *taps0, const float *taps1,
                  const float *temperature, const float *cosine, const float *sine, const int64_t *offset,
                  const float *mixed, const float *length, const float *dqueries_keys, const float *dvalues,
                  float *dprojected, float *dmixed, float *dy, float *dparameters, float *partial) {
    const Cca s = *shape;
    const int64_t heads = s.heads(), channels = s.channels(), width = s.width(), d = s.d, half = s.rotary_half;
    const int64_t group = s.query_heads / s.key_heads, taps = s.kernel1 * d, history = s.kernel1 - 1;
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
            for (int64_t r = 0; r < count; r++)
                for (int64_t lag = 0; lag < s.kernel1; lag++) {
                    const int64_t t = first + r + lag;
                    const bool reaches = t < s.tokens && offset[t] >= lag;
                    for (int64_t h = 0; h < heads; h++) {
                        float *to = gathered + ((r * heads + h) * s.kernel1 + history - lag) * d;
                        if (reaches)
                            memcpy(to, dmixed + t * channels + h * d, 4 * d);
                        else
                            memset(to, 0, 4 * d);
                    }
                }
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

// --- causal attention inside documents -----------------------------------------------------------------------------
//
// queries_keys (tokens, query_heads + key_heads, d), values (tokens, key_heads, d), output (tokens, query_heads, d),
// log_sums (query_heads, tokens). A document and key head is one piece of work, so nothing is shared between threads.

constexpr int64_t QUERY_ROWS = 2 * TILE_ROWS;

struct Piece {
    int64_t first, length, key_head;
};

static Piece piece_of(int64_t index, int64_t key_heads, const int64_t *starts) {
    const int64_t document = index / key_heads;
    return {starts[document], starts[document + 1] - starts[document], index % key_heads};
}

// window: how many keys a query may see, itself included; the document's length or more where all.
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
                multiply(rows, round_up(span, PANEL), d, queries, wide, 1, keys_across + from * d, scores, padded, false);
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
                             keys_down + j * length + from * PANEL, dqueries_keys + (piece.first + row) * wide + h * d + j,
                             wide, false);
            }
    }
}

// --- experts: y = gate * W2_e (silu(g) * u), [g, u] = W1_e x ---------------------------------------------------------
//
// order (visits): tokens sorted by expert; ends (experts): end of each expert's run. w1 (experts, 2F, D), w2 (experts,
// D, F). gate_up (visits, 2F), in sorted order, is kept for the backward pass. Rows of y that no expert writes stay.

constexpr int64_t EXPERT_ROWS = 8 * TILE_ROWS;

static int64_t expert_of(int64_t row, const int64_t *ends) {
    int64_t expert = 0;
    while (ends[expert] <= row) expert++;
    return expert;
}

void experts_forward(int threads, int64_t experts, int64_t hidden, int64_t inner, int64_t visits, const int64_t *order,
                     const int64_t *ends, const float *x, const float *gate, const float *w1, const float *w2,
                     float *y, float *gate_up) {
    const int64_t size1 = packed_size(hidden, 2 * inner), size2 = packed_size(inner, hidden);
    float *packed1 = scratch(0, experts * size1), *packed2 = scratch(1, experts * size2);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t e = 0; e < experts; e++) {
            pack(w1 + e * 2 * inner * hidden, 1, hidden, hidden, 2 * inner, packed1 + e * size1, 0, panels_of(2 * inner));
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

// --- cross-entropy of a head: sum over tokens of log sum_v exp(E_v h) - E_target h ------------------------------------
//
// Logits are made transposed, (vocabulary, tokens): the head is then the left matrix of two products and is never
// repacked for them, and the softmax runs across tokens, a vector lane each. logits: (vocabulary, width) of room, where
// width = tokens rounded up to a multiple of 32. statistics: (threads, 2, width) of room. dhidden (tokens, D), null:
// loss alone; dhidden_partial (threads, tokens, D) of room; dhead (vocabulary, D), overwritten or added to.
// Gradients are those of scale * loss. losses (tokens), unscaled.

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
