// Causal attention over cache blocks, for decoding and for prompt chunks alike.
//
//     o = sum_j softmax_j(q k_j / sqrt(d)) v_j
//
// The keys of a token are visited in segments of SEGMENT blocks. Inside a segment the usual running maximum is kept;
// segments are joined in order. One query goes through the same arithmetic alone, in a chunk, and with its segments
// spread over threads, so its result does not depend on what runs beside it.
//
// A block holds 64 keys as lines: step i of 4 lines has for each key its values g*i .. g*i + g - 1, where g = 1, 2, 4
// for FLOAT32, BFLOAT16, INT8. Values likewise: step j has for each dimension the keys g*j .. g*j + g - 1. Queries and
// weights are broadcast in units of 4 bytes, so both products are one routine.
#pragma once

#include <cfloat>

#include "activations.hpp"
#include "team.hpp"

namespace oz {

constexpr int64_t SEGMENT = 8;      // blocks
constexpr int64_t TILE = 16;        // tokens of a prompt chunk that share the loads of a block
constexpr int QUERIES = 4;          // rows of the inner product

inline int64_t padded_head(int64_t d) { return round_up(d, LANES); }

// What a query has gathered: the largest score, the sum of weights, and the weighted values (padded_head).
struct Gathered {
    float *largest, *total, *values;
};

struct CacheHead {  // one head of one layer: strides between blocks in bytes and floats
    const uint8_t *keys, *values;
    const float *key_scales, *value_scales;
    int64_t block_bytes, block_scales;
};

template <int64_t FORMAT>
struct Kind;
template <>
struct Kind<FLOAT32> {
    static constexpr int PER_LANE = 1;
    using Sums = Floats;
    static Sums zero() { return all(0); }
    static Sums dot(Sums s, Line line_, Line word) { return dot_floats(s, line_, word); }
    static Floats floats(Sums s) { return s; }
};
template <>
struct Kind<BFLOAT16> {
    static constexpr int PER_LANE = 2;
    using Sums = Floats;
    static Sums zero() { return all(0); }
    static Sums dot(Sums s, Line line_, Line word) { return dot_pairs(s, line_, word); }
    static Floats floats(Sums s) { return s; }
};
// Cached keys and values are signed bytes, queries and weights unsigned: queries have 128 added, which the sum of
// the key's bytes would have to be known for; so keys carry the 128 instead (see put_key), and queries stay signed.
template <>
struct Kind<INT8> {
    static constexpr int PER_LANE = 4;
    using Sums = Ints;
    static Sums zero() { return all_ints(0); }
    static Floats floats(Sums s) { return to_floats(s); }
};

// `steps` steps of N lines each, `step_bytes` apart, times R rows of 4-byte words. The lines `ahead` bytes further on
// will be needed next: blocks lie anywhere in memory, and the processor cannot guess where the next one is. They are
// fetched into the second level only, for the first is no larger than a block.
template <int64_t FORMAT, bool KEYS, int R, int N>
inline void lines_times_words(const uint8_t* lines, int64_t step_bytes, int64_t steps, int64_t ahead,
                              const uint32_t* const* words, typename Kind<FORMAT>::Sums (*sums)[N]) {
    using K = Kind<FORMAT>;
    for (int64_t i = 0; i < steps; i++) {
        Line step[N];
        for (int n = 0; n < N; n++) {
            step[n] = line(lines + i * step_bytes + n * 64);
            if (KEYS || i >= BLOCK_TOKENS / (2 * K::PER_LANE))
                __builtin_prefetch(lines + i * step_bytes + n * 64 + ahead, 0, 2);
        }
        for (int r = 0; r < R; r++) {
            Line word = broadcast4(words[r] + i);
            for (int n = 0; n < N; n++) {
                if constexpr (FORMAT == INT8)  // unsigned operand first: keys, or the weights of values
                    sums[r][n] = KEYS ? dot_bytes(sums[r][n], step[n], word) : dot_bytes(sums[r][n], word, step[n]);
                else
                    sums[r][n] = K::dot(sums[r][n], step[n], word);
            }
        }
    }
}

struct Query {
    const uint32_t* words;   // padded_head / PER_LANE
    float scale;             // of the whole score: 1/sqrt(d), times the query's own scale
    int32_t sum;             // of its bytes (INT8)
    int64_t first, last;     // keys it may see, inclusive
    Gathered to;
};

// One block for up to QUERIES queries, added to the running maximum and sums in `to`.
template <int64_t FORMAT, int R>
void attend_block(const CacheHead& cache, int64_t block, int64_t next, int64_t first_key, int64_t head_dim, Query* query) {
    using K = Kind<FORMAT>;
    constexpr int N = 4;
    const int64_t width = padded_head(head_dim), steps = width / K::PER_LANE;
    const int64_t ahead = (next - block) * cache.block_bytes;
    const uint32_t* words[R];
    typename K::Sums sums[R][N];
    for (int r = 0; r < R; r++) {
        words[r] = query[r].words;
        for (int n = 0; n < N; n++) {
            if constexpr (FORMAT == INT8) sums[r][n] = all_ints(-128 * query[r].sum);
            else sums[r][n] = K::zero();
        }
    }
    lines_times_words<FORMAT, true, R, N>(cache.keys + block * cache.block_bytes, 256, steps, ahead, words, sums);

    alignas(64) float weight[R][BLOCK_TOKENS];
    alignas(64) uint32_t packed[R][BLOCK_TOKENS];
    float value_scale[R];
    int64_t used = 0;
    // The first half of the next values is asked for here, where nothing else is read.
    const int64_t half_bytes = BLOCK_TOKENS * width * 4 / K::PER_LANE / 2;
    const uint8_t* next_values = cache.values + next * cache.block_bytes;
    for (int r = 0; r < R; r++) {
        Query& q = query[r];
        float* w = weight[r];
        for (int64_t i = half_bytes * r / R / 64; i < half_bytes * (r + 1) / R / 64; i++)
            __builtin_prefetch(next_values + i * 64, 0, 2);
        for (int n = 0; n < N; n++) {
            Floats score = K::floats(sums[r][n]) * all(q.scale);
            if constexpr (FORMAT == INT8) score = score * load(cache.key_scales + block * cache.block_scales + n * 16);
            store(w + n * 16, score);
        }
        int64_t low = q.first - first_key, high = q.last - first_key + 1;  // keys [low, high) of this block are seen
        low = low < 0 ? 0 : (low > BLOCK_TOKENS ? BLOCK_TOKENS : low);
        high = high < low ? low : (high > BLOCK_TOKENS ? BLOCK_TOKENS : high);
        used = high > used ? high : used;
        if (low == high) {
            std::memset(packed[r], 0, sizeof packed[r]);
            value_scale[r] = 0;
            continue;
        }
        for (int64_t j = 0; j < low; j++) w[j] = -FLT_MAX;
        for (int64_t j = high; j < BLOCK_TOKENS; j++) w[j] = -FLT_MAX;
        const float before = *q.to.largest;
        const float now = oz::largest(larger(larger(load(w), load(w + 16)), larger(load(w + 32), load(w + 48))));
        const float most_so_far = now > before ? now : before;
        const float shrink = exponential(before - most_so_far);
        for (int64_t j = 0; j < BLOCK_TOKENS; j += LANES) store(w + j, exponentials(load(w + j) + all(-most_so_far)));
        for (int64_t j = 0; j < low; j++) w[j] = 0;
        for (int64_t j = high; j < BLOCK_TOKENS; j++) w[j] = 0;
        Floats total = (load(w) + load(w + 16)) + (load(w + 32) + load(w + 48));
        *q.to.total = *q.to.total * shrink + sum(total);
        *q.to.largest = most_so_far;
        for (int64_t i = 0; i < width; i += LANES) store(q.to.values + i, load(q.to.values + i) * all(shrink));
        value_scale[r] = 1;
        if constexpr (FORMAT == FLOAT32) {
            std::memcpy(packed[r], w, sizeof packed[r]);
        } else if constexpr (FORMAT == BFLOAT16) {
            bf16* to = (bf16*)packed[r];
            for (int64_t j = 0; j < BLOCK_TOKENS; j++) to[j] = to_bf16_number(w[j]);
        } else {
            // The values' scales go into the weights, which are then rounded to 8 bits of the block's largest.
            const float* scales = cache.value_scales + block * cache.block_scales;
            Floats most_of = all(0);
            for (int64_t j = 0; j < BLOCK_TOKENS; j += LANES) {
                Floats scaled = load(w + j) * load(scales + j);
                store(w + j, scaled);
                most_of = larger(most_of, scaled);
            }
            const float most = oz::largest(most_of);
            float inverse = most > 1e-36f ? 255.0f / most : 0.0f;
            uint8_t* to = (uint8_t*)packed[r];
            for (int64_t j = 0; j < BLOCK_TOKENS; j++) to[j] = uint8_t(int32_t(__builtin_rintf(w[j] * inverse)));
            value_scale[r] = most * (1.0f / 255.0f);
        }
    }
    for (int r = 0; r < R; r++) words[r] = packed[r];
    const int64_t value_steps = (used + K::PER_LANE - 1) / K::PER_LANE;
    for (int64_t at = 0; at < width / LANES;) {
        const uint8_t* lines = cache.values + block * cache.block_bytes + at * 64;
        auto columns = [&](auto count) {
            constexpr int C = decltype(count)::value;
            typename K::Sums part[R][C];
            for (int r = 0; r < R; r++)
                for (int n = 0; n < C; n++) part[r][n] = K::zero();
            lines_times_words<FORMAT, false, R, C>(lines, width * 4, value_steps, ahead, words, part);
            for (int r = 0; r < R; r++)
                for (int n = 0; n < C; n++) {
                    float* to = query[r].to.values + (at + n) * LANES;
                    store(to, fma(K::floats(part[r][n]), all(value_scale[r]), load(to)));
                }
            at += C;
        };
        if (at + 4 <= width / LANES) columns(std::integral_constant<int, 4>());
        else columns(std::integral_constant<int, 1>());
    }
}

// A run of blocks for any number of queries; `table` is the sequence's page table.
template <int64_t FORMAT>
void attend_blocks(const CacheHead& cache, const int32_t* table, int64_t begin, int64_t end, int64_t head_dim,
                   Query* queries, int64_t count) {
    for (int64_t page = begin; page < end; page++) {
        const int64_t key = page * BLOCK_TOKENS, block = table[page], next = page + 1 < end ? table[page + 1] : block;
        int64_t i = 0;
        for (; i + QUERIES <= count; i += QUERIES)
            attend_block<FORMAT, QUERIES>(cache, block, next, key, head_dim, queries + i);
        for (; i < count; i++) attend_block<FORMAT, 1>(cache, block, next, key, head_dim, queries + i);
    }
}

inline void clear(const Gathered& to, int64_t width) {
    *to.largest = -FLT_MAX;
    *to.total = 0;
    std::memset(to.values, 0, size_t(width) * 4);
}

// Join a segment's result to what the segments before it have gathered.
inline void join(const Gathered& all_, const Gathered& part, int64_t width) {
    if (*part.total == 0) return;
    const float largest = *part.largest > *all_.largest ? *part.largest : *all_.largest;
    const float keep = exponential(*all_.largest - largest), take = exponential(*part.largest - largest);
    *all_.total = *all_.total * keep + *part.total * take;
    *all_.largest = largest;
    for (int64_t i = 0; i < width; i += LANES)
        store(all_.values + i, fma(load(part.values + i), all(take), load(all_.values + i) * all(keep)));
}

// --- writing ----------------------------------------------------------------------------------------------------

inline void put_key(uint8_t* block, float* scale, int64_t format, int64_t place, int64_t head_dim, const float* x) {
    const int64_t width = padded_head(head_dim);
    if (format == FLOAT32) {
        for (int64_t i = 0; i < head_dim; i++) ((float*)block)[i * 64 + place] = x[i];
    } else if (format == BFLOAT16) {
        for (int64_t i = 0; i < head_dim; i++) ((bf16*)block)[i / 2 * 128 + place * 2 + i % 2] = to_bf16(x[i]);
    } else {
        alignas(64) int8_t q[1024];
        int32_t unused;
        Activations::quantise(x, head_dim, width, q, scale, &unused);
        for (int64_t i = 0; i < width; i++) block[i / 4 * 256 + place * 4 + i % 4] = uint8_t(q[i] + 128);
    }
}

inline void put_value(uint8_t* block, float* scale, int64_t format, int64_t place, int64_t head_dim, const float* x) {
    const int64_t width = padded_head(head_dim);
    if (format == FLOAT32) {
        std::memcpy((float*)block + place * width, x, size_t(head_dim) * 4);
    } else if (format == BFLOAT16) {
        for (int64_t i = 0; i < head_dim; i++)
            ((bf16*)block)[place / 2 * width * 2 + i * 2 + place % 2] = to_bf16(x[i]);
    } else {
        alignas(64) int8_t q[1024];
        int32_t unused;
        Activations::quantise(x, head_dim, width, q, scale, &unused);
        for (int64_t i = 0; i < width; i++)
            ((int8_t*)block)[place / 4 * width * 4 + i * 4 + place % 4] = q[i];
    }
}

}  // namespace oz
