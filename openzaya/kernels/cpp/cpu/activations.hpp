// The left operands of matrix products, in the form that each weight format asks for.
#pragma once

#include <cmath>

#include "lanes.hpp"
#include "model.hpp"

namespace oz {

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Behind a row of floats, so that the rows of a tile do not all fall on the same few places of the core's first cache.
constexpr int64_t SKEW = 32;

// Rows of one width; only the wanted forms exist. Rows of bytes are `padded` apart, others `stride()`; up to `padded`
// they are zero behind `columns`.
struct Activations {
    int64_t columns, padded;
    float* floats;
    bf16* shorts;
    int8_t* bytes;      // with a scale and a sum for each group of 64 columns
    float* scales;
    int32_t* sums;

    int64_t groups() const { return padded / GROUP; }
    int64_t stride() const { return padded + SKEW; }

    // The rows from `first` on.
    Activations from(int64_t first) const {
        Activations rest = *this;
        if (floats) rest.floats += first * stride();
        if (shorts) rest.shorts += first * stride();
        if (bytes) rest.bytes += first * padded, rest.scales += first * groups(), rest.sums += first * groups();
        return rest;
    }

    void put(int64_t row, const float* x) const { put(row, x, 0, columns); }

    // Columns `begin` (a multiple of GROUP) to `end` (one too, or the last) of a row; x has only these.
    void put(int64_t row, const float* x, int64_t begin, int64_t end) const {
        const int64_t count = end - begin, room = round_up(count, GROUP);
        if (floats) {
            float* to = floats + row * stride() + begin;
            if (to != x) std::memcpy(to, x, size_t(count) * 4);
            for (int64_t i = count; i < room; i++) to[i] = 0;
        }
        if (shorts) {
            bf16* to = shorts + row * stride() + begin;
            for (int64_t i = 0; i < count; i++) to[i] = to_bf16(x[i]);
            for (int64_t i = count; i < room; i++) to[i] = 0;
        }
        if (bytes) {
            for (int64_t at = 0; at < count; at += GROUP) {
                const int64_t group = row * groups() + (begin + at) / GROUP;
                quantise(x + at, count - at < GROUP ? count - at : GROUP, GROUP, bytes + group * GROUP, scales + group,
                         sums + group);
            }
        }
    }

    // Symmetric: 127 stands for the largest magnitude. `size` bytes are written, zero behind `count`.
    static void quantise(const float* x, int64_t count, int64_t size, int8_t* q, float* scale, int32_t* sum) {
        float largest = 0;
        int64_t at = 0;
        if (count >= LANES) {
            Floats most = all(0);
            for (; at + LANES <= count; at += LANES) most = larger(most, larger(load(x + at), load(x + at) * all(-1)));
            largest = oz::largest(most);
        }
        for (; at < count; at++) largest = std::fabs(x[at]) > largest ? std::fabs(x[at]) : largest;
        // Of numbers too small for their reciprocal nothing is left.
        const float inverse = largest >= 1e-30f ? 127.0f / largest : 0.0f;
        int32_t total = 0;
        for (int64_t i = 0; i < count; i++) {
            int32_t value = int32_t(__builtin_rintf(x[i] * inverse));
            q[i] = int8_t(value);
            total += value;
        }
        for (int64_t i = count; i < size; i++) q[i] = 0;
        *scale = inverse == 0.0f ? 0.0f : largest / 127.0f;
        *sum = total;
    }
};

}  // namespace oz
