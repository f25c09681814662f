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

#include <algorithm>
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

// Where one head of one block begins.
struct HeadBlock {
    const uint8_t *keys, *values;
    const float *key_scales, *value_scales;  // INT8
};

struct CacheHead {  // one head of one layer: strides between blocks in bytes and floats
    const uint8_t *keys, *values;
    const float *key_scales, *value_scales;
    int64_t block_bytes, block_scales;
    HeadBlock block(int64_t block) const {
        return {keys + block * block_bytes, values + block * block_bytes, key_scales + block * block_scales,
                value_scales + block * block_scales};
    }
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

// Lines of the next block, asked for while this one is computed: blocks lie anywhere in memory, and the processor cannot
// guess where the next one is. They come into the second level only, for the first is no larger than a block.
struct Ahead {
    const uint8_t* at;
    void fetch(int64_t lines) {
        for (int64_t i = 0; i < lines; i++, at += 64) __builtin_prefetch(at, 0, 2);
    }
};

// `steps` steps of N lines each, `step_bytes` apart, times R rows of 4-byte words.
template <int64_t FORMAT, bool KEYS, int R, int N, int FETCHED>
inline void lines_times_words(const uint8_t* lines, int64_t step_bytes, int64_t steps, Ahead& next,
                              const uint32_t* const* words, typename Kind<FORMAT>::Sums (*sums)[N]) {
    using K = Kind<FORMAT>;
    for (int64_t i = 0; i < steps; i++) {
        Line step[N];
        for (int n = 0; n < N; n++) step[n] = line(lines + i * step_bytes + n * 64);
        next.fetch(FETCHED);
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

// One block for R queries, added to the running maximum and sums in `to`. FETCH: the block `next` is asked for meanwhile.
template <int64_t FORMAT, int R, bool FETCH>
void attend_block(const CacheHead& cache, int64_t block, HeadBlock next, int64_t first_key, int64_t head_dim, Query* query) {
    using K = Kind<FORMAT>;
    constexpr int N = BLOCK_TOKENS / LANES;
    const int64_t width = padded_head(head_dim), steps = width / K::PER_LANE;
    const uint32_t* words[R];
    typename K::Sums sums[R][N];
    for (int r = 0; r < R; r++) {
        words[r] = query[r].words;
        for (int n = 0; n < N; n++) {
            if constexpr (FORMAT == INT8) sums[r][n] = all_ints(-128 * query[r].sum);
            else sums[r][n] = K::zero();
        }
    }
    Ahead keys{next.keys}, values{next.values};
    if constexpr (FETCH && FORMAT == INT8) {
        Ahead{(const uint8_t*)next.key_scales}.fetch(N);
        Ahead{(const uint8_t*)next.value_scales}.fetch(N);
    }
    lines_times_words<FORMAT, true, R, N, FETCH * N>(cache.keys + block * cache.block_bytes, N * 64, steps, keys, words, sums);

    // What was gathered shrinks where a larger score is found; `share` is what the products with the values count.
    float shrink[R], share[R];
    alignas(64) uint32_t packed[R][BLOCK_TOKENS];
    int64_t used = 0;
    for (int r = 0; r < R; r++) {
        Query& q = query[r];
        if (FETCH) values.fetch(steps * N / 2 / R);  // half of them here, where nothing else is read
        const int64_t low = std::clamp<int64_t>(q.first - first_key, 0, BLOCK_TOKENS);  // keys [low, high) are seen
        const int64_t high = std::clamp<int64_t>(q.last - first_key + 1, low, BLOCK_TOKENS);
        const bool whole = low == 0 && high == BLOCK_TOKENS;
        used = std::max(used, high);
        if (low == high) {
            std::memset(packed[r], 0, sizeof packed[r]);
            shrink[r] = 1, share[r] = 0;
            continue;
        }
        Floats w[N];
        for (int n = 0; n < N; n++) {
            w[n] = K::floats(sums[r][n]) * all(q.scale);
            if constexpr (FORMAT == INT8) w[n] = w[n] * load(cache.key_scales + block * cache.block_scales + n * LANES);
            if (!whole) w[n] = only(w[n], low - n * LANES, high - n * LANES, -FLT_MAX);
        }
        const float before = *q.to.largest;
        const float now = std::max(before, oz::largest(larger(larger(w[0], w[1]), larger(w[2], w[3]))));
        for (int n = 0; n < N; n++) {
            w[n] = exponentials(w[n] + all(-now));
            if (!whole) w[n] = only(w[n], low - n * LANES, high - n * LANES, 0);
        }
        shrink[r] = exponential(before - now), share[r] = 1;
        *q.to.total = *q.to.total * shrink[r] + sum((w[0] + w[1]) + (w[2] + w[3]));
        *q.to.largest = now;
        if constexpr (FORMAT == FLOAT32) {
            for (int n = 0; n < N; n++) store((float*)packed[r] + n * LANES, w[n]);
        } else if constexpr (FORMAT == BFLOAT16) {
            for (int n = 0; n < N; n++) store_bf16((bf16*)packed[r] + n * LANES, w[n]);
        } else {
            // The values' scales go into the weights, which are then rounded to 8 bits of the block's largest.
            for (int n = 0; n < N; n++) w[n] = w[n] * load(cache.value_scales + block * cache.block_scales + n * LANES);
            const float most = oz::largest(larger(larger(w[0], w[1]), larger(w[2], w[3])));
            const float inverse = most > 1e-36f ? 255.0f / most : 0.0f;
            for (int n = 0; n < N; n++) store_bytes((uint8_t*)packed[r] + n * LANES, w[n] * all(inverse));
            share[r] = most * (1.0f / 255.0f);
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
            lines_times_words<FORMAT, false, R, C, FETCH * (C + 1) / 2>(lines, width * 4, value_steps, values, words, part);
            for (int r = 0; r < R; r++)
                for (int n = 0; n < C; n++) {
                    float* to = query[r].to.values + (at + n) * LANES;
                    store(to, fma(K::floats(part[r][n]), all(share[r]), load(to) * all(shrink[r])));
                }
            at += C;
        };
        if (at + 4 <= width / LANES) columns(std::integral_constant<int, 4>());
        else if (at + 2 <= width / LANES) columns(std::integral_constant<int, 2>());
        else columns(std::integral_constant<int, 1>());
    }
}

// A run of blocks for any number of queries; `table` is the sequence's page table, `after` the block that will be read
// next.
template <int64_t FORMAT>
void attend_blocks(const CacheHead& cache, const int32_t* table, int64_t begin, int64_t end, int64_t head_dim,
                   Query* queries, int64_t count, HeadBlock after) {
    for (int64_t page = begin; page < end; page++) {
        const int64_t key = page * BLOCK_TOKENS, block = table[page];
        const HeadBlock next = page + 1 < end ? cache.block(table[page + 1]) : after;
        int64_t i = 0;
        auto attend = [&](auto rows) {
            constexpr int R = decltype(rows)::value;
            if (i == 0) attend_block<FORMAT, R, true>(cache, block, next, key, head_dim, queries);
            else attend_block<FORMAT, R, false>(cache, block, next, key, head_dim, queries + i);
            i += R;
        };
        while (i + QUERIES <= count) attend(std::integral_constant<int, QUERIES>());
        while (i + 2 <= count) attend(std::integral_constant<int, 2>());
        while (i < count) attend(std::integral_constant<int, 1>());
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
