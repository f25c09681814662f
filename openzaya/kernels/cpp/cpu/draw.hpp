// From logits to tokens: openzaya/infer/sampling.py says how, `probabilities` there is the plain twin.
//
// A row's weights are e^((x - largest) / temperature). A token is kept or becomes zero: top-k keeps what is not smaller
// than the k-th largest, top-p the smallest set of largest weights that holds its share, min-p what is not below a share
// of the largest. The border of top-p is found without sorting, by sums of what is not below a number. The token is where
// the running sum passes the uniform number's share.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "activations.hpp"

namespace oz {

// A row's settings; temperature 0 is greedy. All fields are 8 bytes wide, as in the array that Python passes.
struct Drawing {
    double temperature, top_k, top_p, min_p, uniform;
};

constexpr int64_t PIECE = 64;
constexpr float SMALLEST_TEMPERATURE = 1e-30f;
constexpr float SMALLEST_EXPONENT = -87.0f;  // below it a weight is zero

// No number counts as impossible, +inf as the largest number; where all are impossible they count alike. A draw always
// succeeds.
inline float usable(float x) { return !(x == x) ? -INFINITY : x > FLT_MAX ? FLT_MAX : x; }

// The sum of 64 numbers or more is that of pieces of 64 in single precision, for speed, added in double precision.
inline double mass(const float* x, int64_t n) {
    double total = 0;
    int64_t i = 0;
    for (; i + PIECE <= n; i += PIECE)
        total += double(sum((load(x + i) + load(x + i + 16)) + (load(x + i + 32) + load(x + i + 48))));
    for (; i < n; i++) total += double(x[i]);
    return total;
}

// The sum of what is not below `bound`; of pieces, like `mass`. `n` is a multiple of 16.
inline double mass_from(const float* x, int64_t n, float bound) {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += 16 * PIECE) {
        const int64_t end = std::min(begin + 16 * PIECE, n);
        Floats sums[4] = {all(0), all(0), all(0), all(0)};
        int64_t i = begin;
        for (; i + PIECE <= end; i += PIECE)
            for (int k = 0; k < 4; k++) sums[k] = sums[k] + at_least(load(x + i + k * LANES), bound);
        for (; i < end; i += LANES) sums[0] = sums[0] + at_least(load(x + i), bound);
        total += double(sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
    }
    return total;
}

inline float float_of(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline int32_t bits_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// The fewest largest of `x` whose sum reaches `target`: those above a number, and so many of its equals.
struct Nucleus {
    float smallest = 0;
    int64_t equals = 0;
};

// The number is the largest that leaves enough. Numbers from 0 on are ordered as their bits are, so it is found bit by
// bit: a pass over all of `x` for each takes less time than moving them does. `n` is a multiple of 16.
inline Nucleus nucleus(const float* x, int64_t n, float least, double target) {
    int32_t enough = bits_of(least), too_few = bits_of(1.0f) + 1;  // the largest weight is 1
    if (mass_from(x, n, least) < target) return {0, n};
    while (too_few - enough > 1) {
        const int32_t middle = enough + (too_few - enough) / 2;
        (mass_from(x, n, float_of(middle)) >= target ? enough : too_few) = middle;
    }
    const float smallest = float_of(enough);
    const double above = mass_from(x, n, float_of(too_few));
    return {smallest, std::max<int64_t>(1, int64_t(std::ceil((target - above) / double(smallest))))};
}

inline float largest_of(const float* x, int64_t n) {
    float most = x[0];
    int64_t i = 0;
    if (n >= LANES) {
        Floats lanes = load(x);
        for (i = LANES; i + LANES <= n; i += LANES) lanes = larger(lanes, load(x + i));
        most = largest(lanes);
    }
    for (; i < n; i++) most = x[i] > most ? x[i] : most;
    return most;
}

// e^((x - most) / temperature) in place; zero where that would be below e^-87. `n` is a multiple of 16.
inline void weigh(float* x, int64_t n, float most, float temperature) {
    const Floats inverse = all(1.0f / temperature), least = exponentials(all(SMALLEST_EXPONENT)) * all(-1);
    for (int64_t i = 0; i < n; i += LANES) store(x + i, exponentials((load(x + i) + all(-most)) * inverse) + least);
}

// What is not below `bound`, into `to`: how many. Most pieces hold nothing of it.
inline int64_t gather(const float* x, int64_t n, float bound, float* to) {
    int64_t count = 0;
    for (int64_t begin = 0; begin < n; begin += PIECE) {
        const int64_t end = std::min(begin + PIECE, n);
        if (largest_of(x + begin, end - begin) < bound) continue;
        for (int64_t i = begin; i < end; i++) {
            to[count] = x[i];
            count += x[i] >= bound;
        }
    }
    return count;
}

// `room` has place for n numbers.
inline float kth_largest(const float* x, int64_t n, int64_t k, float* room) {
    auto select = [&](int64_t count) {
        std::nth_element(room, room + k - 1, room + count, [](float a, float b) { return a > b; });
        return room[k - 1];
    };
    // Of so many pieces' largest numbers the k-th is a bound: most numbers need no closer look.
    float bound = -FLT_MAX;
    const int64_t pieces = n / PIECE;
    if (k <= pieces) {
        for (int64_t i = 0; i < pieces; i++) room[i] = largest_of(x + i * PIECE, PIECE);
        bound = select(pieces);
    }
    return select(gather(x, n, bound, room));
}

// Makes zero what top-p leaves out. Of equals the token with the smaller id comes first. `room` has place for n numbers
// and 16 more.
inline void keep_nucleus(float* e, int64_t n, double top_p, float* room) {
    const double total = mass(e, n);
    // All weights below this one together are less than what may be left out.
    const float small = float((1 - top_p) * total / double(n) * 0.999);
    const int64_t count = gather(e, n, small, room), padded = round_up(count, LANES);
    std::fill(room + count, room + padded, 0.0f);
    const Nucleus kept = nucleus(room, padded, small, top_p * total);
    int32_t equals = 0;
    for (int64_t i = 0; i < n; i++) {
        e[i] = e[i] < kept.smallest ? 0.0f : e[i];
        equals += e[i] == kept.smallest;
    }
    for (int64_t i = n - 1; equals > kept.equals; i--)
        if (e[i] == kept.smallest) e[i] = 0, equals--;
}

// The natural logarithm of a token's share at temperature 1; no number where the logits are none.
inline float logprob_row(const float* logits, int64_t n, int64_t token) {
    static thread_local std::vector<float> weights;
    const int64_t padded = round_up(n, LANES);
    weights.resize(size_t(padded));
    std::copy_n(logits, n, weights.begin());
    std::fill(weights.begin() + n, weights.end(), -INFINITY);
    const float most = largest_of(weights.data(), n);
    bool is_number = std::fabs(most) <= FLT_MAX;
    for (int64_t i = 0; i < n; i++) is_number &= logits[i] == logits[i];
    if (!is_number) return NAN;
    weigh(weights.data(), padded, most, 1.0f);
    return float(double(logits[token] - most) - std::log(mass(weights.data(), n)));
}

// Where the running sum of weights passes `threshold`.
inline int64_t pick(const float* e, int64_t n, double threshold) {
    double reached = 0;
    for (int64_t begin = 0; begin < n; begin += PIECE) {
        const int64_t end = std::min(begin + PIECE, n);
        const double part = mass(e + begin, end - begin);
        if (reached + part <= threshold && end < n) {
            reached += part;
            continue;
        }
        double inside = reached;
        for (int64_t i = begin; i < end; i++) {
            inside += double(e[i]);
            if (e[i] > 0 && inside > threshold) return i;
        }
        reached += part;
    }
    // Rounding: the last token that is kept.
    int64_t last = n - 1;
    while (e[last] == 0) last--;
    return last;
}

// The row's token. With `logprob` also what logprob_row says of it, which at temperature 1 takes no weights of its own.
inline int64_t draw_row(const float* logits, int64_t n, const Drawing& drawing, float* logprob = nullptr) {
    if (logprob && drawing.temperature != 1) {
        const int64_t token = draw_row(logits, n, drawing);
        *logprob = logprob_row(logits, n, token);
        return token;
    }
    static thread_local std::vector<float> weights, pool;
    const int64_t padded = round_up(n, LANES);
    weights.resize(size_t(padded)), pool.resize(size_t(padded + LANES));
    float* e = weights.data();
    bool is_number = true;
    for (int64_t i = 0; i < n; i++) {
        e[i] = usable(logits[i]);
        is_number &= e[i] == logits[i];
    }
    for (int64_t i = n; i < padded; i++) e[i] = -INFINITY;
    float most = largest_of(e, n);
    if (most < -FLT_MAX) std::fill_n(e, n, most = -FLT_MAX), is_number = false;
    if (drawing.temperature == 0) return std::find(e, e + n, most) - e;
    weigh(e, padded, most, std::max(float(drawing.temperature), SMALLEST_TEMPERATURE));
    const double all_mass = mass(e, n);
    auto drop_below = [&](float bound) {
        for (int64_t i = 0; i < n; i++) e[i] = e[i] < bound ? 0.0f : e[i];
    };
    if (drawing.top_k > 0 && drawing.top_k < double(n)) drop_below(kth_largest(e, n, int64_t(drawing.top_k), pool.data()));
    if (drawing.top_p < 1) keep_nucleus(e, n, drawing.top_p, pool.data());
    if (drawing.min_p > 0) drop_below(float(drawing.min_p));
    const int64_t token = pick(e, n, drawing.uniform * mass(e, n));
    if (logprob) *logprob = is_number ? float(double(logits[token] - most) - std::log(all_mass)) : NAN;
    return token;
}

}  // namespace oz
