// Compressed Convolutional Attention of a step (arXiv 2510.04476), phase by phase; openzaya/model/cca.py says what it is.
//
//     z = [q, k];  y = depthwise(z);  c = grouped(y);  Q, K = RoPE(norm(c + mean of q and k));  V = [now, one token late]
//
// The depthwise bias is left out of y and has its part in the grouped constant, so zeros are the start of a sequence.
#pragma once

#include "context.hpp"

namespace oz {

inline void project(const Context& s, const Team& team, const Layer& layer) {
    const int64_t c = s.channels(), late = s.late_size();
    const Product products[] = {
        {&layer.query, 0, s.b.normed, s.every_token(), {s.b.z, c}},
        {&layer.key, 0, s.b.normed, s.every_token(), {s.b.z + s.m.query_heads * s.m.head_dim, c}},
        {&layer.value_now, 0, s.b.normed, s.every_token(), {s.b.now, late}},
        {&layer.value_late, 0, s.b.normed, s.every_token(), {s.b.late, late}},
    };
    multiply(team, products, 4);
}

// z of the token `lag` before; null before the sequence's first token.
inline const float* z_before(const Context& s, int64_t layer, int64_t token, int64_t lag) {
    const Sequence& q = s.sequence(token);
    const int64_t index = token - lag - q.first;
    if (index >= 0) return s.b.z + (token - lag) * s.channels();
    if (q.start + index < 0) return nullptr;
    return s.slot_state(q.slot, layer) + (s.history() + index) * s.channels();
}

// The grouped convolution's input for one head and token: each channel's last k1 values y, side by side like the weights.
// `y` keeps the values of the tokens before, latest first; `follows`: it was filled for the token before this one.
inline void fill_taps(const Context& s, const Layer& layer, int64_t index, int64_t token, int64_t head, bool follows,
                      float* y, float* row) {
    const int64_t d = s.m.head_dim, c = s.channels(), k0 = s.m.kernel0, k1 = s.m.kernel1;
    if (follows) std::memmove(y + d, y, size_t((k1 - 1) * d) * 4);
    for (int64_t lag = 0; lag < (follows ? 1 : k1); lag++) {
        float* __restrict to = y + lag * d;
        std::memset(to, 0, size_t(d) * 4);
        for (int64_t back = 0; back < k0; back++) {
            const float* z = z_before(s, index, token, lag + back);
            if (!z) continue;
            const float* tap = layer.depthwise + (k0 - 1 - back) * c + head * d;
            for (int64_t i = 0; i < d; i++) to[i] += z[head * d + i] * tap[i];
        }
    }
    auto interleave = [&](auto lags) {
        float* __restrict to = row;
        for (int64_t i = 0; i < d; i++)
            for (int64_t lag = 0; lag < lags; lag++) to[i * lags + (lags - 1 - lag)] = y[lag * d + i];
    };
    if (k1 == 2) interleave(std::integral_constant<int64_t, 2>());
    else interleave(k1);
}

inline void put_query(const Context& s, int64_t token, int64_t head, const float* x) {
    const int64_t d = s.m.head_dim, width = padded_head(d), at = token * s.m.query_heads + head;
    uint32_t* words = s.b.words + at * width;
    float scale = 1.0f / std::sqrt(float(d));
    if (s.memory.format == FLOAT32) {
        std::memset(words, 0, size_t(width) * 4);
        std::memcpy(words, x, size_t(d) * 4);
    } else if (s.memory.format == BFLOAT16) {
        bf16* to = (bf16*)words;
        for (int64_t i = 0; i < width; i++) to[i] = i < d ? to_bf16(x[i]) : 0;
    } else {
        float own;
        Activations::quantise(x, d, width, (int8_t*)words, &own, s.b.query_sum + at);
        scale *= own;
    }
    s.b.query_scale[at] = scale;
}

// From a head's mixed channels to the query, or to the key in its block: QK-mean, norm, temperature, RoPE.
inline void finish_head(const Context& s, const Layer& layer, int64_t index, int64_t token, int64_t head, float* x) {
    const Model& m = s.m;
    const int64_t d = m.head_dim, group = m.query_heads / m.key_heads;
    const bool is_key = head >= m.query_heads;
    const int64_t key = is_key ? head - m.query_heads : head / group;
    const float *z = s.b.z + token * s.channels(), *zk = z + (m.query_heads + key) * d;
    const float* constant = layer.convolution_constant + head * d;
    const float share = 1.0f / float(group);
    if (is_key) {
        static thread_local std::vector<float> total;
        total.assign(size_t(d), 0.0f);
        for (int64_t j = 0; j < group; j++)
            for (int64_t i = 0; i < d; i++) total[size_t(i)] += z[(key * group + j) * d + i];
        for (int64_t i = 0; i < d; i++) x[i] = x[i] + constant[i] + 0.5f * (total[size_t(i)] * share + zk[i]);
    } else {
        for (int64_t i = 0; i < d; i++) x[i] = x[i] + constant[i] + 0.5f * (z[head * d + i] + zk[i]);
    }
    const float length = std::max(std::sqrt(sum_of_squares(x, d)), 1.1920929e-7f);
    const float scale = std::sqrt(float(d)) / length * (is_key ? layer.temperature[key] : 1.0f);
    for (int64_t i = 0; i < d; i++) x[i] *= scale;
    const int64_t angles = (layer.rotary * s.w.tokens + token) * m.rotary_half;
    rotate(x, s.b.cosine + angles, s.b.sine + angles, m.rotary_half);
    if (!is_key) return put_query(s, token, head, x);
    const int64_t position = s.position(token), place = position % BLOCK_TOKENS;
    const int64_t at = s.cached_head(index, s.sequence(token).blocks[position / BLOCK_TOKENS], key);
    float* key_scale = s.memory.key_scales ? s.memory.key_scales + at * BLOCK_TOKENS + place : nullptr;
    put_key(s.memory.keys + at * s.head_bytes(), key_scale, s.memory.format, place, d, x);
}

// The two halves of the value channels side by side, then cut into heads.
inline void write_values(const Context& s, int64_t index, int64_t token, float* value) {
    const int64_t d = s.m.head_dim, half = s.late_size();
    const Sequence& q = s.sequence(token);
    const int64_t position = s.position(token), block = q.blocks[position / BLOCK_TOKENS], place = position % BLOCK_TOKENS;
    const float* late = token > q.first ? s.b.late + (token - 1) * half
                        : q.start > 0   ? s.slot_state(q.slot, index) + s.history() * s.channels()
                                        : nullptr;
    std::memcpy(value, s.b.now + token * half, size_t(half) * 4);
    if (late) std::memcpy(value + half, late, size_t(half) * 4);
    else std::memset(value + half, 0, size_t(half) * 4);
    for (int64_t head = 0; head < s.m.key_heads; head++) {
        const int64_t at = s.cached_head(index, block, head);
        float* value_scale = s.memory.value_scales ? s.memory.value_scales + at * BLOCK_TOKENS + place : nullptr;
        put_value(s.memory.values + at * s.head_bytes(), value_scale, s.memory.format, place, d, value + head * d);
    }
}

constexpr int64_t MIXED_TOGETHER = 48;  // tokens

// Everything between the projections and attention, by heads and some tokens at a time; the values count as a head.
inline void mix(const Context& s, const Team& team, const Layer& layer, int64_t index) {
    const int64_t d = s.m.head_dim, heads = s.m.query_heads + s.m.key_heads, k1 = s.m.kernel1;
    const bool pairs = layer.grouped.format == BFLOAT16;
    const int64_t tiles = (s.w.tokens + MIXED_TOGETHER - 1) / MIXED_TOGETHER, inputs = d * k1, padded = round_up(inputs, GROUP);
    const int64_t room = MIXED_TOGETHER * (padded + SKEW) + 64;
    team.each((heads + 1) * tiles, [&](int64_t piece) {
        static thread_local std::vector<float> floats, mixed, row, y;
        static thread_local std::vector<bf16> shorts;
        const int64_t head = piece % (heads + 1), begin = piece / (heads + 1) * MIXED_TOGETHER;
        const int64_t count = std::min(MIXED_TOGETHER, s.w.tokens - begin);
        row.resize(size_t(std::max(inputs, 2 * s.late_size())));
        if (head == heads) {
            for (int64_t i = 0; i < count; i++) write_values(s, index, begin + i, row.data());
            return;
        }
        mixed.resize(size_t(count * d));
        y.resize(size_t(inputs));
        (pairs ? shorts.resize(size_t(room)) : floats.resize(size_t(room)));
        const Activations taps{inputs, padded, pairs ? nullptr : floats.data(), pairs ? shorts.data() : nullptr, nullptr, nullptr, nullptr};
        for (int64_t i = 0; i < count; i++) {
            // A token's head lies far from the next one's, so they are asked for ahead.
            const float* soon = s.b.z + std::min(begin + i + 2, s.w.tokens - 1) * s.channels() + head * d;
            for (int64_t j = 0; j < d; j += LANES) __builtin_prefetch(soon + j);
            const bool follows = i > 0 && begin + i > s.sequence(begin + i).first;
            fill_taps(s, layer, index, begin + i, head, follows, y.data(), row.data());
            taps.put(i, row.data());
        }
        Matrix own = layer.grouped;
        own.data += head * d * inputs * (pairs ? 2 : 4);
        own.rows = d;
        Product{&own, 0, taps, {nullptr, nullptr, count}, {mixed.data(), d}}.rows({0, d});
        for (int64_t i = 0; i < count; i++) finish_head(s, layer, index, begin + i, head, mixed.data() + i * d);
    });
}

inline Gathered gathered(const Context& s, int64_t token, int64_t head) {
    const int64_t at = token * s.m.query_heads + head, width = padded_head(s.m.head_dim);
    return {s.b.largest + at, s.b.total + at, s.b.values + at * width};
}

inline Gathered part_of(const Context& s, int64_t part, int64_t head) {
    const int64_t at = part * s.m.query_heads + head, width = padded_head(s.m.head_dim);
    return {s.b.part_largest + at, s.b.part_total + at, s.b.part_values + at * width};
}

inline CacheHead cache_head(const Context& s, int64_t index, int64_t head) {
    const int64_t zero = s.cached_head(index, 0, head);
    return {s.memory.keys + zero * s.head_bytes(), s.memory.values + zero * s.head_bytes(),
            s.memory.key_scales ? s.memory.key_scales + zero * BLOCK_TOKENS : nullptr,
            s.memory.value_scales ? s.memory.value_scales + zero * BLOCK_TOKENS : nullptr,
            s.m.key_heads * s.head_bytes(), s.m.key_heads * BLOCK_TOKENS};
}

inline int64_t first_key(const Layer& layer, int64_t position) {
    return layer.window ? std::max<int64_t>(0, position - layer.window + 1) : 0;
}

// The block that a piece reads first.
inline HeadBlock first_block(const Context& s, const Layer& layer, int64_t index, const Piece& piece) {
    const int64_t first = first_key(layer, s.position(piece.token)) / BLOCK_TOKENS;
    const int64_t page = std::max<int64_t>(first, piece.segment * SEGMENT);
    return cache_head(s, index, piece.head).block(s.w.sequence[piece.sequence].blocks[page]);
}

// `following`: the piece that this thread will probably take next.
template <int64_t FORMAT>
void attend_piece(const Context& s, const Layer& layer, int64_t index, const Piece& piece, const Piece& following) {
    const Model& m = s.m;
    const Sequence& q = s.w.sequence[piece.sequence];
    const int64_t group = m.query_heads / m.key_heads, width = padded_head(m.head_dim), count = piece.count * group;
    const CacheHead cache = cache_head(s, index, piece.head);
    static thread_local std::vector<Query> queries;
    static thread_local std::vector<float> room;
    queries.resize(size_t(count));
    room.resize(size_t(count * (width + 2)));
    int64_t first = 0, last = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t token = piece.token + i / group, head = piece.head * group + i % group;
        const int64_t at = token * m.query_heads + head, position = s.position(token);
        const int64_t from = first_key(layer, position);
        const bool is_part = piece.segment >= 0;
        Gathered to = is_part ? part_of(s, s.plan.first_part[size_t(piece.sequence)] + piece.segment, head)
                              : Gathered{&room[size_t(i * 2)], &room[size_t(i * 2 + 1)], &room[size_t(count * 2 + i * width)]};
        queries[size_t(i)] = {s.b.words + at * width, s.b.query_scale[at], FORMAT == INT8 ? s.b.query_sum[at] : 0, from, position, to};
        if (!is_part) clear(gathered(s, token, head), width);
        first = i == 0 ? from : std::min(first, from);
        last = std::max(last, position);
    }
    const int64_t blocks = last / BLOCK_TOKENS + 1, segments = (blocks - 1) / SEGMENT + 1;
    const int64_t begin = piece.segment >= 0 ? piece.segment : 0, end = piece.segment >= 0 ? begin + 1 : segments;
    for (int64_t segment = begin; segment < end; segment++) {
        for (const Query& query : queries) clear(query.to, width);
        const int64_t low = std::max(segment * SEGMENT, first / BLOCK_TOKENS), high = std::min(blocks, (segment + 1) * SEGMENT);
        const HeadBlock after = segment + 1 < end ? cache.block(q.blocks[high]) : first_block(s, layer, index, following);
        attend_blocks<FORMAT>(cache, q.blocks, low, high, m.head_dim, queries.data(), count, after);
        if (piece.segment < 0)
            for (int64_t i = 0; i < count; i++)
                join(gathered(s, piece.token + i / group, piece.head * group + i % group), queries[size_t(i)].to, width);
    }
}

// The pieces are taken in order, so a thread's next one is as far behind this one as there are threads.
inline void attend(const Context& s, const Team& team, const Layer& layer, int64_t index) {
    const std::vector<Piece>& pieces = s.plan.pieces;
    team.each(int64_t(pieces.size()), [&](int64_t i) {
        const Piece &piece = pieces[size_t(i)], &following = pieces[std::min(size_t(i + team.size), pieces.size() - 1)];
        if (s.memory.format == FLOAT32) attend_piece<FLOAT32>(s, layer, index, piece, following);
        else if (s.memory.format == BFLOAT16) attend_piece<BFLOAT16>(s, layer, index, piece, following);
        else attend_piece<INT8>(s, layer, index, piece, following);
    });
}

// Some heads of a token: join the parts where there are some, divide by the sum of weights, and make it the output
// matrix's operand.
inline void finish_attention(const Context& s, int64_t token, Range heads) {
    const int64_t d = s.m.head_dim, width = padded_head(d), sequence = s.plan.sequence_of[size_t(token)];
    float* row = s.b.rows + token * s.m.query_heads * d;
    for (int64_t head = heads.begin; head < heads.end; head++) {
        const Gathered to = gathered(s, token, head);
        if (s.plan.first_part[size_t(sequence)] >= 0) {
            clear(to, width);
            const int64_t segments = s.position(token) / (SEGMENT * BLOCK_TOKENS) + 1;
            for (int64_t i = 0; i < segments; i++)
                join(to, part_of(s, s.plan.first_part[size_t(sequence)] + i, head), width);
        }
        const float inverse = 1.0f / *to.total;
        for (int64_t i = 0; i < d; i++) row[head * d + i] = to.values[i] * inverse;
    }
    s.b.attended.put(token, row + heads.begin * d, heads.begin * d, heads.end * d);
}

// A token behind a long context has many parts to join: heads are shared out, where each is whole groups of the operand.
inline void finish_attention(const Context& s, const Team& team) {
    const int64_t heads = s.m.query_heads, unit = s.m.head_dim % GROUP ? heads : 1;
    const Range own = team.share(s.w.tokens * heads, unit);
    for (int64_t i = own.begin; i < own.end; i += unit) finish_attention(s, i / heads, {i % heads, i % heads + unit});
}

// The CCA state behind each block's last token goes into the block, behind the sequence's last token into its slot.
// One thread does all of a sequence: a block may end so early in the step that its state reaches back into the slot.
inline void keep_states(const Context& s, int64_t index, const Sequence& q) {
    const int64_t c = s.channels(), history = s.history();
    static thread_local std::vector<float> state;
    const int64_t until_block_ends = BLOCK_TOKENS - 1 - q.start % BLOCK_TOKENS, last = q.count - 1;
    for (int64_t i = std::min(until_block_ends, last);; i = std::min(i + BLOCK_TOKENS, last)) {
        const int64_t token = q.first + i, position = q.start + i;
        state.assign(size_t(s.state_size()), 0.0f);
        for (int64_t j = 0; j < history; j++)
            if (const float* z = z_before(s, index, token, history - 1 - j)) std::copy_n(z, c, &state[size_t(j * c)]);
        std::copy_n(s.b.late + token * s.late_size(), s.late_size(), &state[size_t(history * c)]);
        if ((position + 1) % BLOCK_TOKENS == 0)
            std::copy(state.begin(), state.end(), s.block_state(q.blocks[position / BLOCK_TOKENS], index));
        if (i == last) {
            std::copy(state.begin(), state.end(), s.slot_state(q.slot, index));
            return;
        }
    }
}

}  // namespace oz
