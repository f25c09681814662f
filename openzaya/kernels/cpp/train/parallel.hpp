// Threads: how work is cut, the memory each thread keeps, and sums over threads.
//
// Work is cut by thread number in a fixed way, and partial sums are added in thread order, so the same inputs and
// number of threads give the same bits. Threads are torch's own OpenMP pool (build.py links no OpenMP library).

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace {

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Memory of one thread that only grows, so that no call pays for fresh pages. `slot` tells apart what is in use at
// once; 6 and 7 are matrix.hpp's.
float *scratch(int slot, int64_t floats) {
    struct Buffers {
        float *data[8] = {};
        int64_t size[8] = {};
        ~Buffers() {
            for (float *buffer : data) free(buffer);
        }
    };
    static thread_local Buffers buffers;
    if (buffers.size[slot] < floats) {
        free(buffers.data[slot]);
        buffers.size[slot] = round_up(floats, 1024);
        buffers.data[slot] = static_cast<float *>(aligned_alloc(64, 4 * buffers.size[slot]));
        if (!buffers.data[slot]) abort();
    }
    return buffers.data[slot];
}

// The part [first, last) of `count` items that belongs to this thread, cut at multiples of `unit`.
struct Share {
    int64_t first, last;
    Share(int64_t count, int64_t unit = 1) {
        const int64_t units = (count + unit - 1) / unit, threads = omp_get_num_threads(), thread = omp_get_thread_num();
        first = std::min(count, units * thread / threads * unit);
        last = std::min(count, units * (thread + 1) / threads * unit);
    }
};

// out[i] = sum over threads of partial[thread][i], in thread order.
void add_partials(const float *partial, int64_t threads, int64_t size, float *out) {
    for (int64_t i = 0; i < size; i++) out[i] = partial[i];
    for (int64_t thread = 1; thread < threads; thread++)
        for (int64_t i = 0; i < size; i++) out[i] += partial[thread * size + i];
}

}  // namespace
