// What every phase of a step sees: the model, the sequences' memory, the work, and the buffers in between.
#pragma once

#include <algorithm>
#include <vector>

#include "layers.hpp"
#include "product.hpp"

namespace oz {

struct Piece {  // of attention: some tokens of a sequence, one key head, some segments
    int32_t sequence, head;
    int32_t token, count;
    int32_t segment;  // -1: all, joined on the spot; else this one, kept as a part
};

struct Plan {
    std::vector<Piece> pieces;
    std::vector<int32_t> sequence_of;  // token -> sequence
    std::vector<int64_t> first_part;   // sequence -> its parts, one a segment; -1: none
    int64_t parts = 0;
};

inline Plan make_plan(const Model& m, const Work& w) {
    Plan plan;
    plan.sequence_of.resize(size_t(w.tokens));
    for (int64_t s = 0; s < w.sequences; s++) {
        const Sequence& q = w.sequence[s];
        std::fill_n(plan.sequence_of.begin() + q.first, q.count, int32_t(s));
        const int64_t segments = (q.start + q.count - 1) / (SEGMENT * BLOCK_TOKENS) + 1;
        const bool spread = q.count == 1 && segments > 1;
        plan.first_part.push_back(spread ? plan.parts : -1);
        for (int64_t head = 0; head < m.key_heads; head++) {
            if (spread)
                for (int64_t i = 0; i < segments; i++)
                    plan.pieces.push_back({int32_t(s), int32_t(head), int32_t(q.first), 1, int32_t(i)});
            else
                for (int64_t t = 0; t < q.count; t += TILE)
                    plan.pieces.push_back({int32_t(s), int32_t(head), int32_t(q.first + t),
                                           int32_t(std::min(TILE, q.count - t)), -1});
        }
        if (spread) plan.parts += segments;
    }
    // The long pieces first: short ones then fill the gaps.
    std::stable_sort(plan.pieces.begin(), plan.pieces.end(), [&](const Piece& a, const Piece& b) {
        auto cost = [&](const Piece& p) {
            const Sequence& q = w.sequence[p.sequence];
            return p.segment >= 0 ? SEGMENT * BLOCK_TOKENS : p.count * (q.start + p.token - q.first + p.count);
        };
        return cost(a) > cost(b);
    });
    return plan;
}

// Memory of a step, cut from one piece; without an address it only measures.
struct Buffers {
    float *x, *z, *y, *rows, *state, *previous, *hidden, *classes, *gates, *cosine, *sine;
    float *now, *late;
    Activations normed, attended, routed, active;
    uint32_t* words;
    float *query_scale, *largest, *total, *values, *part_largest, *part_total, *part_values;
    int32_t* query_sum;
    int32_t* choice;
    int64_t bytes;

    Buffers(const Model& m, const Work& w, int64_t parts, uint8_t* base) {
        uint8_t* at = base;
        auto take = [&](auto*& pointer, int64_t count) {
            using T = std::remove_reference_t<decltype(*pointer)>;
            pointer = base ? (T*)at : nullptr;
            at += round_up(count * int64_t(sizeof(T)) + 64, 64);
        };
        auto take_activations = [&](Activations& a, int64_t rows, int64_t columns, std::initializer_list<int64_t> formats) {
            a = {columns, round_up(columns, GROUP), nullptr, nullptr, nullptr, nullptr, nullptr};
            for (int64_t format : formats) {
                if (format == FLOAT32 && !a.floats) take(a.floats, rows * a.stride());
                if (format == BFLOAT16 && !a.shorts) take(a.shorts, rows * a.stride());
                if (format >= INT8 && !a.bytes) {
                    take(a.bytes, rows * a.padded);
                    take(a.scales, rows * a.groups());
                    take(a.sums, rows * a.groups());
                }
            }
        };
        const int64_t n = w.tokens, d = m.hidden, c = (m.query_heads + m.key_heads) * m.head_dim;
        const int64_t heads = m.query_heads, width = padded_head(m.head_dim), late_size = m.key_heads * m.head_dim / 2;
        const Layer& l = m.layer[0];
        take(x, n * d), take(y, n * d), take(z, n * c), take(rows, n * heads * m.head_dim), take(now, n * late_size), take(late, n * late_size);
        take_activations(normed, std::max(n, w.logits_rows), d,
                         {l.query.format, l.key.format, l.value_now.format, l.value_late.format, l.router_down.format,
                          l.gate_up.format, m.head.format});
        take_activations(attended, n, heads * m.head_dim, {l.output.format});
        take_activations(routed, n, m.router_width, {l.fc1.format, l.fc2.format, l.router_out.format});
        take_activations(active, n, m.width, {l.down.format});
        take(state, n * m.router_width), take(previous, n * m.router_width), take(hidden, n * m.router_width);
        take(classes, n * (m.experts + 1)), take(gates, n), take(choice, n);
        take(cosine, 2 * n * m.rotary_half), take(sine, 2 * n * m.rotary_half);
        take(words, n * heads * width), take(query_scale, n * heads), take(query_sum, n * heads);
        take(largest, n * heads), take(total, n * heads), take(values, n * heads * width);
        take(part_largest, parts * heads), take(part_total, parts * heads), take(part_values, parts * heads * width);
        bytes = at - base + 256;
    }
};

struct Context {
    const Model& m;
    const Memory& memory;
    const Work& w;
    const Plan& plan;
    const Buffers& b;

    int64_t channels() const { return (m.query_heads + m.key_heads) * m.head_dim; }
    int64_t late_size() const { return m.key_heads * m.head_dim / 2; }
    int64_t history() const { return m.kernel0 + m.kernel1 - 2; }
    // A layer's part of a CCA state: the last vectors z, oldest first, and the last delayed value.
    int64_t state_size() const { return history() * channels() + late_size(); }
    float* slot_state(int64_t slot, int64_t layer) const {
        return memory.slots + (slot * m.layers + layer) * state_size();
    }
    float* block_state(int64_t block, int64_t layer) const {
        return memory.snapshots + (block * m.layers + layer) * state_size();
    }
    int64_t head_bytes() const {
        const int64_t element = memory.format == FLOAT32 ? 4 : memory.format == BFLOAT16 ? 2 : 1;
        return BLOCK_TOKENS * padded_head(m.head_dim) * element;
    }
    // The place of a block's head among all of a layer's.
    int64_t cached_head(int64_t layer, int64_t block, int64_t head) const {
        return (layer * memory.blocks + block) * m.key_heads + head;
    }
    const Sequence& sequence(int64_t token) const { return w.sequence[plan.sequence_of[size_t(token)]]; }
    int64_t position(int64_t token) const { return sequence(token).start + token - sequence(token).first; }
    Rows every_token() const { return {nullptr, nullptr, w.tokens}; }
};

}  // namespace oz
