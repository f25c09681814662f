// Matrix products y = x W^T for few or many tokens, row-major float and packed integer weights.
//
// Every sum runs over the columns in one order, whatever the tile: a token's result does not depend on the tokens
// beside it. Tiles of TOKENS tokens by ROWS rows (or BLOCKS blocks of 16 rows) use a loaded weight several times.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "activations.hpp"
#include "team.hpp"
#include "tiles.hpp"

namespace oz {

#ifdef OZ_AVX512
constexpr int TOKENS = 6, ROWS = 4, BLOCKS = 2;
#else
constexpr int TOKENS = 2, ROWS = 2, BLOCKS = 1;
#endif
constexpr int64_t TOKENS_IN_CACHE = 20 * TOKENS;  // this many rows of activations stay in the core's cache
constexpr int64_t PREFETCH_BYTES = 4096;          // ahead of what is read from memory in order
constexpr int64_t UNPACK_FROM = 2 * TOKENS;       // from this many tokens on, 4-bit blocks are unpacked once

// Which tokens: positions i of a list (null: 0, 1, ...) in the activations and in the output.
struct Rows {
    const int64_t *from, *to;
    int64_t count;
    int64_t input(int64_t i) const { return from ? from[i] : i; }
    int64_t output(int64_t i) const { return to ? to[i] : i; }
};

struct Output {
    float* data;
    int64_t stride;
};

// --- float weights ----------------------------------------------------------------------------------------------

template <bool PAIRS, int T, int R>
inline void float_tile(const uint8_t* const* x, const uint8_t* w, int64_t row_bytes, float* const* y) {
    Floats sums[T][R];
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) sums[t][r] = all(0);
    // Where these loops are not unrolled early, the compiler keeps the sums in memory: a third of a short product's time.
    auto add = [&](const Line* rows, int64_t at) {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            Line token = line(x[t] + at);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                sums[t][r] = PAIRS ? dot_pairs(sums[t][r], rows[r], token) : dot_floats(sums[t][r], rows[r], token);
        }
    };
    Line rows[R];
    int64_t at = 0;
#pragma GCC unroll 4
    for (; at <= row_bytes - 64; at += 64) {
        for (int r = 0; r < R; r++) {
            __builtin_prefetch(w + r * row_bytes + at + PREFETCH_BYTES);
            rows[r] = line(w + r * row_bytes + at);
        }
        add(rows, at);
    }
    if (at < row_bytes) {
        for (int r = 0; r < R; r++) rows[r] = line_first(w + r * row_bytes + at, int(row_bytes - at));
        add(rows, at);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) store_sums(y[t], sums[t]);
}

template <bool PAIRS, int R, int T = TOKENS>
inline void float_tiles(int tokens, const uint8_t* const* x, const uint8_t* w, int64_t row_bytes, float* const* y) {
    if constexpr (T > 1) {
        if (tokens < T) return float_tiles<PAIRS, R, T - 1>(tokens, x, w, row_bytes, y);
    }
    float_tile<PAIRS, T, R>(x, w, row_bytes, y);
}

template <bool PAIRS>
void float_product(const Matrix& w, int64_t expert, const uint8_t* x, int64_t x_stride, Rows tokens, Range rows, Output out) {
    const int64_t row_bytes = w.columns * (PAIRS ? 2 : 4);
    const uint8_t* weights = w.data + expert * w.stride;
    for (int64_t begin = 0; begin < tokens.count; begin += TOKENS_IN_CACHE) {
        const int64_t end = std::min(begin + TOKENS_IN_CACHE, tokens.count), tiles = (end - begin + TOKENS - 1) / TOKENS;
        for (int64_t row = rows.begin; row < rows.end;) {
            const bool whole = row + ROWS <= rows.end;
            // Tiles of nearly one size: small ones load their weights more than they multiply.
            for (int64_t tile = 0, token = begin; tile < tiles; tile++) {
                const int count = int((end - token + tiles - tile - 1) / (tiles - tile));
                const uint8_t* from[TOKENS];
                float* to[TOKENS];
                for (int t = 0; t < count; t++) {
                    from[t] = x + tokens.input(token + t) * x_stride;
                    to[t] = out.data + tokens.output(token + t) * out.stride + row;
                    __builtin_prefetch(to[t], 1);
                }
                const uint8_t* at = weights + row * row_bytes;
                if (whole) float_tiles<PAIRS, ROWS>(count, from, at, row_bytes, to);
                else float_tiles<PAIRS, 1>(count, from, at, row_bytes, to);
                token += count;
            }
            row += whole ? ROWS : 1;
        }
    }
}

// --- packed integer weights -------------------------------------------------------------------------------------

struct Bytes {
    const int8_t* q;
    const float* scales;
    const int32_t* sums;
};

// Lines that will be needed next; a tile asks for `lines` of them with each group, into the second level of the cache.
struct Next {
    const uint8_t* at = nullptr;
    int64_t lines = 0;
};

// B blocks of 16 rows by T tokens. Weights are unsigned: with w = u - bias, sum w a = sum u a - bias * sum a, and the
// sums of a group's activations are known. BITS is how the lines hold them, SCALED whether each group has a scale.
template <int BITS, bool SCALED, int T, int B>
inline void packed_tile(const Bytes* x, const uint8_t* w, int64_t block_bytes, const uint8_t* scales,
                        int64_t block_scale_bytes, int32_t bias, int64_t groups, Next next, Floats (*y)[B]) {
    constexpr int64_t LINES = BITS == 8 ? 16 : 8;
    // Few tokens: several sums of the same rows, for an instruction must not wait for the one before it.
    constexpr int PARTS = T * B == 1 ? 4 : T * B == 2 ? 2 : 1;
    Floats totals[T][B];
    for (int t = 0; t < T; t++)
        for (int b = 0; b < B; b++) totals[t][b] = all(0);
    for (int64_t g = 0; g < groups; g++) {
        Ints sums[T][B][PARTS];
        for (int t = 0; t < T; t++)
            for (int b = 0; b < B; b++)
                for (int p = 0; p < PARTS; p++) sums[t][b][p] = all_ints(p ? 0 : -bias * x[t].sums[g]);
        const uint8_t* at = w + g * LINES * 64;
        for (int64_t i = 0; i < next.lines; i++) __builtin_prefetch(next.at + (g * next.lines + i) * 64, 0, 2);
#pragma GCC unroll 16
        for (int64_t i = 0; i < LINES; i++) {
            for (int b = 0; b < B; b++) {
                const uint8_t* address = at + b * block_bytes + i * 64;
                if (T <= 2) __builtin_prefetch(address + PREFETCH_BYTES);
                Line packed = line(address);
                if constexpr (BITS == 8) {
                    for (int t = 0; t < T; t++) {
                        Ints& sum = sums[t][b][i % PARTS];
                        const Line token = broadcast4(x[t].q + g * 64 + 4 * i);
                        sum = SCALED ? dot_small_bytes(sum, packed, token) : dot_bytes(sum, packed, token);
                    }
                } else {
                    Line low = low_nibbles(packed), high = high_nibbles(packed);
                    for (int t = 0; t < T; t++) {
                        Ints &first = sums[t][b][2 * i % PARTS], &second = sums[t][b][(2 * i + 1) % PARTS];
                        first = dot_small_bytes(first, low, broadcast4(x[t].q + g * 64 + 8 * i));
                        second = dot_small_bytes(second, high, broadcast4(x[t].q + g * 64 + 8 * i + 4));
                    }
                }
            }
        }
        for (int b = 0; b < B; b++) {
            Floats scale = all(1);
            if constexpr (SCALED) scale = load_floats((const bf16*)(scales + b * block_scale_bytes) + g * LANES);
            for (int t = 0; t < T; t++) {
                Floats both = all(x[t].scales[g]);
                if constexpr (SCALED) both = both * scale;
                for (int p = 1; p < PARTS; p++) sums[t][b][0] = sums[t][b][0] + sums[t][b][p];
                totals[t][b] = fma(to_floats(sums[t][b][0]), both, totals[t][b]);
            }
        }
    }
    for (int b = 0; b < B; b++) {
        Floats scale = all(1);
        if constexpr (!SCALED) scale = load((const float*)(scales + b * block_scale_bytes));
        for (int t = 0; t < T; t++) y[t][b] = SCALED ? totals[t][b] : totals[t][b] * scale;
    }
}

template <int BITS, bool SCALED, int B, int T = TOKENS>
inline void packed_tiles(int tokens, const Bytes* x, const uint8_t* w, int64_t block_bytes, const uint8_t* scales,
                         int64_t block_scale_bytes, int32_t bias, int64_t groups, Next next, float* const* y,
                         const int* widths) {
    if constexpr (T > 1) {
        if (tokens < T)
            return packed_tiles<BITS, SCALED, B, T - 1>(tokens, x, w, block_bytes, scales, block_scale_bytes, bias,
                                                        groups, next, y, widths);
    }
    Floats result[T][B];
    packed_tile<BITS, SCALED, T, B>(x, w, block_bytes, scales, block_scale_bytes, bias, groups, next, result);
    for (int t = 0; t < T; t++)
        for (int b = 0; b < B; b++) {
            if (widths[b] == LANES) store(y[t] + b * LANES, result[t][b]);
            else store_first(y[t] + b * LANES, result[t][b], widths[b]);
        }
}

template <int BITS, bool SCALED>
void packed_panel(const uint8_t* w, int64_t block_bytes, const uint8_t* scales, int64_t block_scale_bytes, int32_t bias,
                  const Activations& x, Rows tokens, Range range, int64_t row, int64_t num_rows, Next all_next,
                  Output out) {
    // A single token reads one block behind the other, as they lie in memory.
    if (tokens.count == 1 && num_rows > LANES) {
        for (int64_t first = 0; first < num_rows; first += LANES)
            packed_panel<BITS, SCALED>(w + first / LANES * block_bytes, block_bytes,
                                       scales + first / LANES * block_scale_bytes, block_scale_bytes, bias, x, tokens,
                                       range, row + first, std::min(LANES, num_rows - first), {}, out);
        return;
    }
    const bool two = BLOCKS == 2 && num_rows > LANES;
    int widths[2];
    for (int b = 0; b < 2; b++) {
        int64_t left = num_rows - b * LANES;
        widths[b] = int(left < LANES ? left : LANES);
    }
    // Tiles of nearly one size: small ones wait for their weights more than they multiply.
    const int64_t tiles = (range.end - range.begin + TOKENS - 1) / TOKENS;
    const int64_t steps = tiles * x.groups();
    Next next{all_next.at, (all_next.lines + steps - 1) / steps};
    for (int64_t tile = 0, token = range.begin; tile < tiles; tile++, next.at += next.lines * x.groups() * 64) {
        const int count = int((range.end - token + tiles - tile - 1) / (tiles - tile));
        Bytes from[TOKENS];
        float* to[TOKENS];
        for (int t = 0; t < count; t++) {
            int64_t i = tokens.input(token + t);
            from[t] = {x.bytes + i * x.padded, x.scales + i * x.groups(), x.sums + i * x.groups()};
            to[t] = out.data + tokens.output(token + t) * out.stride + row;
            // What is written comes into the cache while the tile is multiplied, not when its end waits for it.
            for (int b = 0; b < 1 + two; b++) __builtin_prefetch(to[t] + b * LANES, 1);
        }
        if (two)
            packed_tiles<BITS, SCALED, BLOCKS>(count, from, w, block_bytes, scales, block_scale_bytes, bias, x.groups(),
                                               next, to, widths);
        else
            packed_tiles<BITS, SCALED, 1>(count, from, w, block_bytes, scales, block_scale_bytes, bias, x.groups(), next,
                                          to, widths);
        token += count;
    }
}

inline uint8_t* panel_room(int64_t bytes) {
    static thread_local uint8_t* memory = nullptr;
    static thread_local int64_t size = 0;
    if (size < bytes) {
        _mm_free(memory);
        memory = (uint8_t*)_mm_malloc(size_t(bytes), 64);
        size = bytes;
    }
    return memory;
}

#ifdef OZ_TILES
constexpr int64_t TILES_FROM = 16;  // tokens

// Tokens of a list one behind the other, as tiles are loaded, up to whole tiles.
struct TileInputs {
    std::vector<int8_t> bytes;
    const Activations* x = nullptr;

    void gather(const Activations& activations, Rows tokens, Range range) {
        x = &activations;
        bytes.assign(size_t(round_up(range.end - range.begin, 16) * activations.padded), 0);
        for (int64_t i = range.begin; i < range.end; i++)
            std::memcpy(&bytes[size_t((i - range.begin) * x->padded)], x->bytes + tokens.input(i) * x->padded,
                        size_t(x->padded));
    }
};

// packed_panel with tiles of 16 tokens: the same sums of integers, added in the same order.
template <bool SCALED>
void tiled_panel(const uint8_t* w, int64_t block_bytes, const uint8_t* scales, int64_t block_scale_bytes, int32_t bias,
                 const TileInputs& inputs, Rows tokens, Range range, int64_t row, int64_t num_rows, Output out) {
    const Activations& x = *inputs.x;
    const int blocks = num_rows > LANES ? 2 : 1;
    alignas(64) float totals[2][16][LANES];
    alignas(64) int32_t sums[2][16][LANES];
    for (int64_t first = range.begin; first < range.end; first += 16) {
        const int count = int(std::min<int64_t>(16, range.end - first));
        std::memset(totals, 0, sizeof totals);
        for (int64_t g = 0; g < x.groups(); g++) {
            tile_load<0>(&inputs.bytes[size_t((first - range.begin) * x.padded + g * 64)], x.padded);
            tile_load<1>(w + g * 1024, 64);
            tile_zero<3>();
            tile_dot<3, 0, 1>();
            tile_store<3>(sums[0], 64);
            if (blocks == 2) {
                tile_load<2>(w + block_bytes + g * 1024, 64);
                tile_zero<4>();
                tile_dot<4, 0, 2>();
                tile_store<4>(sums[1], 64);
            }
            for (int b = 0; b < blocks; b++) {
                Floats scale = all(1);
                if constexpr (SCALED) scale = load_floats((const bf16*)(scales + b * block_scale_bytes) + g * LANES);
                for (int t = 0; t < count; t++) {
                    const int64_t at = tokens.input(first + t) * x.groups() + g;
                    Floats both = all(x.scales[at]);
                    if constexpr (SCALED) both = both * scale;
                    const Ints sum = all_ints(-bias * x.sums[at]) + load_ints(sums[b][t]);
                    store(totals[b][t], fma(to_floats(sum), both, load(totals[b][t])));
                }
            }
        }
        for (int b = 0; b < blocks; b++) {
            const int width = int(std::min<int64_t>(LANES, num_rows - b * LANES));
            Floats scale = all(1);
            if constexpr (!SCALED) scale = load((const float*)(scales + b * block_scale_bytes));
            for (int t = 0; t < count; t++) {
                float* to = out.data + tokens.output(first + t) * out.stride + row + b * LANES;
                store_first(to, SCALED ? load(totals[b][t]) : load(totals[b][t]) * scale, width);
            }
        }
    }
}
#endif

inline void packed_product(const Matrix& w, int64_t expert, const Activations& x, Rows tokens, Range rows, Output out) {
    const bool four_bits = w.format == INT4;
    const int64_t groups = round_up(w.columns, GROUP) / GROUP;
    const int64_t block_bytes = groups * (four_bits ? 512 : 1024);
    const int64_t scale_bytes = four_bits ? groups * LANES * 2 : LANES * 4;
#ifdef OZ_TILES
    static thread_local TileInputs inputs;
    const bool tiled = tokens.count >= TILES_FROM;
    std::optional<UsingTiles> shapes;
    if (tiled) shapes.emplace();
#else
    constexpr bool tiled = false;
#endif
    const bool unpack = four_bits && (tokens.count >= UNPACK_FROM || tiled);
    for (int64_t begin = 0; begin < tokens.count; begin += TOKENS_IN_CACHE) {
        const Range range{begin, std::min(begin + TOKENS_IN_CACHE, tokens.count)};
#ifdef OZ_TILES
        if (tiled) inputs.gather(x, tokens, range);
#endif
        for (int64_t row = rows.begin; row < rows.end; row += BLOCKS * LANES) {
            const int64_t num_rows = std::min(BLOCKS * LANES, rows.end - row);
            const uint8_t* at = w.data + expert * w.stride + row / LANES * block_bytes;
            const uint8_t* scales = w.scales + expert * w.scale_stride + row / LANES * scale_bytes;
            if (four_bits && !unpack) {
                packed_panel<4, true>(at, block_bytes, scales, scale_bytes, 8, x, tokens, range, row, num_rows, {}, out);
                continue;
            }
            // One and two tokens have a prefetch of their own.
            const bool more = tokens.count > 2 && row + BLOCKS * LANES < rows.end;
            const Next next{at + BLOCKS * block_bytes, more ? BLOCKS * block_bytes / 64 : 0};
            int64_t wide_block_bytes = block_bytes;
            if (four_bits) {
                const int64_t lines = round_up(num_rows, LANES) / LANES * groups * 8;
                uint8_t* wide = panel_room(lines * 128);
                for (int64_t i = 0; i < lines; i++) {
                    const Line packed = line(at + i * 64);
                    store_line(wide + i * 128, low_nibbles(packed));
                    store_line(wide + i * 128 + 64, high_nibbles(packed));
                }
                at = wide, wide_block_bytes = groups * 1024;
            }
            auto panel = [&](auto scaled, int32_t bias) {
                constexpr bool SCALED = decltype(scaled)::value;
#ifdef OZ_TILES
                if (tiled)
                    return tiled_panel<SCALED>(at, wide_block_bytes, scales, scale_bytes, bias, inputs, tokens, range,
                                               row, num_rows, out);
#endif
                packed_panel<8, SCALED>(at, wide_block_bytes, scales, scale_bytes, bias, x, tokens, range, row, num_rows,
                                        next, out);
            };
            if (four_bits) panel(std::true_type(), 8);
            else panel(std::false_type(), 128);
        }
    }
}

// --- any weights ------------------------------------------------------------------------------------------------

struct Product {
    const Matrix* weights;
    int64_t expert;
    Activations x;
    Rows tokens;
    Output y;

    void rows(Range range) const {
        if (weights->format == FLOAT32)
            float_product<false>(*weights, expert, (const uint8_t*)x.floats, x.stride() * 4, tokens, range, y);
        else if (weights->format == BFLOAT16)
            float_product<true>(*weights, expert, (const uint8_t*)x.shorts, x.stride() * 2, tokens, range, y);
        else
            packed_product(*weights, expert, x, tokens, range, y);
    }
};

constexpr int64_t MAX_PRODUCTS = 256;
constexpr int64_t MANY_TOKENS = 16;

// How many rows of a matrix a thread takes at a time, a multiple of `unit`: enough to be read at full speed. With many
// tokens a piece takes long, and those of all `products` are of one length. `all_rows` and `tokens` are sums over them.
inline int64_t piece_rows(const Team& team, int64_t rows, int64_t all_rows, int64_t products, int64_t tokens, int64_t unit) {
    const bool many = tokens >= MANY_TOKENS * products;
    const int64_t pieces = many ? team.size * std::max<int64_t>(8, 2 * products) : 8 * team.size;
    return std::max(unit, round_up(((many ? all_rows : rows) + pieces - 1) / pieces, unit));
}

// y = x W^T, one or several; their rows are handed out in pieces.
inline void multiply(const Team& team, const Product* products, int64_t count) {
    int64_t ends[MAX_PRODUCTS], lengths[MAX_PRODUCTS], units = 0, wanted = 0, tokens = 0, all_rows = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!products[i].tokens.count) continue;
        wanted++, tokens += products[i].tokens.count, all_rows += products[i].weights->rows;
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t rows = products[i].weights->rows;
        const int64_t share = piece_rows(team, rows, all_rows, wanted, tokens, 2 * LANES);
        lengths[i] = share;
        if (products[i].tokens.count) units += (rows + share - 1) / share;
        ends[i] = units;
    }
    team.each(units, [&](int64_t unit) {
        int64_t i = 0;
        while (ends[i] <= unit) i++;
        const int64_t begin = (unit - (i ? ends[i - 1] : 0)) * lengths[i], rows = products[i].weights->rows;
        products[i].rows({begin, begin + lengths[i] < rows ? begin + lengths[i] : rows});
    });
}

inline void multiply(const Team& team, const Product& product) { multiply(team, &product, 1); }

}  // namespace oz
