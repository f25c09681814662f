// One step of the whole model for a ragged batch: some sequences bring one token, others a piece of their prompt.
//
// All threads walk through the phases of each layer together. Matrix products and attention are handed out in pieces,
// the rest is shared out by tokens. `team.wait()` stands where the next phase reads what
// another thread has written.
#pragma once

#include "cca.hpp"
#include "moe.hpp"

namespace oz {

inline void embed(const Context& s, int64_t token) {
    const Model& m = s.m;
    float* x = s.b.x + token * m.hidden;
    embedding_row(m.embedding, s.w.token[token], x);
    for (int64_t i = 0; i < m.hidden; i++) x[i] = (x[i] + m.input_bias[i]) * m.input_scale[i];
    for (int64_t kind = 0; kind < 2; kind++)
        for (int64_t i = 0; i < m.rotary_half; i++) {
            const float angle = float(s.position(token)) * m.frequencies[kind][i];
            const int64_t at = (kind * s.w.tokens + token) * m.rotary_half + i;
            s.b.cosine[at] = std::cos(angle), s.b.sine[at] = std::sin(angle);
        }
}

inline void norm(const Context& s, const float* weight, int64_t token) {
    const int64_t d = s.m.hidden;
    static thread_local std::vector<float> row;
    row.resize(size_t(d));
    rms_norm(s.b.x + token * d, weight, d, float(s.m.epsilon), row.data());
    s.b.normed.put(token, row.data());
}

inline void run_attention(const Context& s, const Team& team, const Layer& layer, int64_t index) {
    team.wait();
    project(s, team, layer);
    team.wait();
    mix(s, team, layer, index);
    team.wait();
    attend(s, team, layer, index);
    team.wait();
    finish_attention(s, team);
    for (int64_t i = team.index; i < s.w.sequences; i += team.size) keep_states(s, index, s.w.sequence[i]);
    team.wait();
    multiply(team, {&layer.output, 0, s.b.attended, s.every_token(), {s.b.y, s.m.hidden}});
    team.wait();
}

inline void run(const Context& s, const Team& team) {
    const Model& m = s.m;
    const int64_t d = m.hidden;
    const Range own = team.share(s.w.tokens);
    for (int64_t t = own.begin; t < own.end; t++) embed(s, t);
    for (int64_t index = 0; index < m.layers; index++) {
        const Layer& l = m.layer[index];
        if (index == 0)
            for (int64_t t = own.begin; t < own.end; t++) norm(s, l.input_norm, t);
        run_attention(s, team, l, index);
        for (int64_t t = own.begin; t < own.end; t++) {
            merge(s.b.x + t * d, s.b.y + t * d, 1.0f, l.attention_scale, l.attention_bias, l.attention_residual_scale,
                  l.attention_residual_bias, d);
            norm(s, l.mlp_norm, t);
        }
        route(s, team, l, index, own);
        run_experts(s, team, l);
        for (int64_t t = own.begin; t < own.end; t++) {
            merge(s.b.x + t * d, s.b.choice[t] == m.experts ? nullptr : s.b.y + t * d, s.b.gates[t], l.mlp_scale,
                  l.mlp_bias, l.mlp_residual_scale, l.mlp_residual_bias, d);
            if (index + 1 < m.layers) norm(s, m.layer[index + 1].input_norm, t);
        }
    }
    if (s.w.logits_rows == 0) return;
    team.wait();
    for (int64_t i = team.index; i < s.w.sequences; i += team.size) {
        const Sequence& q = s.w.sequence[i];
        for (int64_t row = 0; row < q.logits_count; row++) {
            const int64_t t = q.first + q.count - q.logits_count + row;
            rms_norm(s.b.x + t * d, m.final_norm, d, float(m.epsilon), s.b.y + t * d);
            s.b.normed.put(q.logits_first + row, s.b.y + t * d);
        }
    }
    team.wait();
    multiply(team, {&m.head, 0, s.b.normed, {nullptr, nullptr, s.w.logits_rows}, {s.w.logits, m.vocabulary}});
}

}  // namespace oz
