// Router and experts of a step (arXiv 2605.05365); openzaya/model/router.py and experts.py say what they are.
#pragma once

#include "context.hpp"

namespace oz {

// Which expert each token visits, and how much its output counts. Ends with the tokens sorted by expert.
inline void route(const Context& s, const Team& team, const Layer& layer, int64_t index, Range own) {
    const Model& m = s.m;
    const int64_t r = m.router_width, classes = m.experts + 1;
    const float epsilon = float(m.epsilon);
    team.wait();
    multiply(team, {&layer.router_down, 0, s.b.normed, s.every_token(), {s.b.state, r}});
    team.wait();
    for (int64_t t = own.begin; t < own.end; t++) {
        float *state = s.b.state + t * r, *previous = s.b.previous + t * r, *hidden = s.b.hidden + t * r;
        for (int64_t i = 0; i < r; i++) state[i] += layer.router_bias[i];
        if (layer.router_scale)
            for (int64_t i = 0; i < r; i++) state[i] += previous[i] * layer.router_scale[i];
        std::memcpy(previous, state, size_t(r) * 4);
        rms_norm(state, layer.router_norm, r, epsilon, hidden);
        s.b.routed.put(t, hidden);
    }
    team.wait();
    multiply(team, {&layer.fc1, 0, s.b.routed, s.every_token(), {s.b.hidden, r}});
    team.wait();
    for (int64_t t = own.begin; t < own.end; t++) {
        gelu(s.b.hidden + t * r, layer.fc1_bias, r);
        s.b.routed.put(t, s.b.hidden + t * r);
    }
    team.wait();
    multiply(team, {&layer.fc2, 0, s.b.routed, s.every_token(), {s.b.hidden, r}});
    team.wait();
    for (int64_t t = own.begin; t < own.end; t++) {
        gelu(s.b.hidden + t * r, layer.fc2_bias, r);
        s.b.routed.put(t, s.b.hidden + t * r);
    }
    team.wait();
    multiply(team, {&layer.router_out, 0, s.b.routed, s.every_token(), {s.b.classes, classes}});
    team.wait();
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
    if (team.index == 0) {
        int64_t* begin = s.b.begin;
        std::fill_n(begin, classes + 1, 0);
        for (int64_t t = 0; t < s.w.tokens; t++) begin[s.b.choice[t] + 1]++;
        for (int64_t e = 0; e < classes; e++) begin[e + 1] += begin[e];
        std::vector<int64_t> next(begin, begin + classes);
        for (int64_t t = 0; t < s.w.tokens; t++) s.b.order[next[size_t(s.b.choice[t])]++] = t;
    }
    team.wait();
}

// y = W2 (silu(g) * u), [g, u] = W1 x, expert by expert; every thread has a share of each expert's rows.
inline void run_experts(const Context& s, const Team& team, const Layer& layer) {
    const Model& m = s.m;
    const int64_t visits = s.b.begin[m.experts];
    Product first[MAX_PRODUCTS], second[MAX_PRODUCTS];
    for (int64_t e = 0; e < m.experts; e++) {
        const int64_t begin = s.b.begin[e], count = s.b.begin[e + 1] - begin;
        const int64_t* tokens = s.b.order + begin;
        first[e] = {&layer.gate_up, e, s.b.normed, {tokens, nullptr, count}, {s.b.gate_up + begin * 2 * m.width, 2 * m.width}};
        second[e] = {&layer.down, e, s.b.active.from(begin), {nullptr, tokens, count}, {s.b.y, m.hidden}};
    }
    multiply(team, first, m.experts);
    team.wait();
    const Range own = team.share(visits);
    for (int64_t i = own.begin; i < own.end; i++) {
        float* row = s.b.gate_up + i * 2 * m.width;
        gated(row, m.width);
        s.b.active.put(i, row);
    }
    team.wait();
    multiply(team, second, m.experts);
    team.wait();
}

}  // namespace oz
