// Router and experts of a step (arXiv 2605.05365); openzaya/model/router.py and experts.py say what they are.
#pragma once

#include "context.hpp"

namespace oz {

constexpr int64_t TOKENS_ALONE = 48;  // from this many a thread on, its tokens keep it busy for long enough

// Which expert each token visits, and how much its output counts. Each thread goes through its own tokens; where these
// are few, the down-projection, which is most of the router's weights, is shared out by rows.
inline void route(const Context& s, const Team& team, const Layer& layer, int64_t index, Range own) {
    const Model& m = s.m;
    const int64_t r = m.router_width, classes = m.experts + 1, count = own.end - own.begin;
    float *states = s.b.state + own.begin * r, *hidden = s.b.hidden + own.begin * r;
    if (s.w.tokens >= TOKENS_ALONE * team.size) {
        Product{&layer.router_down, 0, s.b.normed.from(own.begin), {nullptr, nullptr, count}, {states, r}}.rows({0, r});
    } else {
        team.wait();
        multiply(team, {&layer.router_down, 0, s.b.normed, s.every_token(), {s.b.state, r}});
        team.wait();
    }
    const Activations routed = s.b.routed.from(own.begin);
    auto next = [&](const Matrix& weights, float* to, int64_t width) {
        Product{&weights, 0, routed, {nullptr, nullptr, count}, {to, width}}.rows({0, weights.rows});
    };
    for (int64_t t = 0; t < count; t++) {
        float *state = states + t * r, *previous = s.b.previous + (own.begin + t) * r;
        for (int64_t i = 0; i < r; i++) state[i] += layer.router_bias[i];
        if (layer.router_scale)
            for (int64_t i = 0; i < r; i++) state[i] += previous[i] * layer.router_scale[i];
        std::memcpy(previous, state, size_t(r) * 4);
        rms_norm(state, layer.router_norm, r, float(m.epsilon), hidden + t * r);
        routed.put(t, hidden + t * r);
    }
    const std::pair<const Matrix*, const float*> hidden_layers[] = {{&layer.fc1, layer.fc1_bias}, {&layer.fc2, layer.fc2_bias}};
    for (auto [weights, bias] : hidden_layers) {
        next(*weights, hidden, r);
        for (int64_t t = 0; t < count; t++) {
            gelu(hidden + t * r, bias, r);
            routed.put(t, hidden + t * r);
        }
    }
    next(layer.router_out, s.b.classes + own.begin * classes, classes);
    for (int64_t t = own.begin; t < own.end; t++) {
        float* shares = s.b.classes + t * classes;
        float largest = shares[0], total = 0;
        for (int64_t e = 1; e < classes; e++) largest = std::max(largest, shares[e]);
        for (int64_t e = 0; e < classes; e++) total += shares[e] = exponential(shares[e] - largest);
        for (int64_t e = 0; e < classes; e++) shares[e] /= total;
        int64_t choice = 0;
        for (int64_t e = 1; e < classes; e++)
            if (shares[e] + layer.balancing[e] > shares[choice] + layer.balancing[choice]) choice = e;
        const uint8_t forced = s.w.forced ? s.w.forced[t * m.layers + index] : 255;
        if (forced != 255) choice = forced;
        s.b.choice[t] = int32_t(choice);
        s.b.gates[t] = choice == m.experts ? 0.0f : shares[choice];
        s.w.experts[t * m.layers + index] = uint8_t(choice);
    }
    team.wait();
}

// Tokens sorted by expert, the skip class last, and where each expert's begin.
struct Visits {
    std::vector<int64_t> order, begin, next;

    void sort(const int32_t* choice, int64_t tokens, int64_t classes) {
        begin.assign(size_t(classes + 1), 0);
        for (int64_t t = 0; t < tokens; t++) begin[size_t(choice[t] + 1)]++;
        for (int64_t e = 0; e < classes; e++) begin[size_t(e + 1)] += begin[size_t(e)];
        next = begin;
        order.resize(size_t(tokens));
        for (int64_t t = 0; t < tokens; t++) order[size_t(next[size_t(choice[t])]++)] = t;
    }
};

// Rows `part` of both halves of an expert's first matrix for its tokens, and the gate, while what it takes is still in the
// core's cache; rows of `to` begin with the expert's.
inline void gate_and_up(const Context& s, const Layer& layer, int64_t expert, Rows tokens, Activations to, Range part) {
    const int64_t width = s.m.width, length = part.end - part.begin, stride = 2 * length;
    static thread_local std::vector<float> room;
    room.resize(size_t(std::min(tokens.count, TOKENS_IN_CACHE) * stride));
    for (int64_t begin = 0; begin < tokens.count; begin += TOKENS_IN_CACHE) {
        const Rows some{tokens.from + begin, nullptr, std::min(TOKENS_IN_CACHE, tokens.count - begin)};
        Product product{&layer.gate_up, expert, s.b.normed, some, {room.data() - part.begin, stride}};
        if (length == width) {
            product.rows({0, 2 * width});
        } else {
            product.rows(part);
            product.y.data = room.data() + length - (width + part.begin);
            product.rows({width + part.begin, width + part.end});
        }
        for (int64_t i = 0; i < some.count; i++) {
            float* row = room.data() + i * stride;
            gated(row, row + length, length);
            to.put(begin + i, row, part.begin, part.end);
        }
    }
}

// y = W2 (silu(g) * u), [g, u] = W1 x, expert by expert; the rows of each are shared out.
inline void run_experts(const Context& s, const Team& team, const Layer& layer) {
    const Model& m = s.m;
    static thread_local Visits visits;  // every thread sorts for itself: that takes less time than to wait
    visits.sort(s.b.choice, s.w.tokens, m.experts + 1);
    Product second[MAX_PRODUCTS];
    int64_t visited[MAX_PRODUCTS], wanted = 0;
    for (int64_t e = 0; e < m.experts; e++) {
        const int64_t begin = visits.begin[size_t(e)], count = visits.begin[size_t(e + 1)] - begin;
        const int64_t* tokens = visits.order.data() + begin;
        second[e] = {&layer.down, e, s.b.active.from(begin), {nullptr, tokens, count}, {s.b.y, m.hidden}};
        if (count) visited[wanted++] = e;
    }
    // A half that does not end with a group is not cut: its second half would begin inside a block of rows.
    const int64_t tokens = visits.begin[size_t(m.experts)];
    const int64_t share = piece_rows(team, m.width, wanted * m.width, wanted, tokens, m.width % GROUP ? m.width : GROUP);
    const int64_t parts = (m.width + share - 1) / share;
    team.each(wanted * parts, [&](int64_t piece) {
        const int64_t e = visited[piece / parts], begin = piece % parts * share;
        const Rows own{second[e].tokens.to, nullptr, second[e].tokens.count};
        gate_and_up(s, layer, e, own, second[e].x, {begin, std::min(begin + share, m.width)});
    });
    team.wait();
    multiply(team, second, m.experts);
    team.wait();
}

}  // namespace oz
