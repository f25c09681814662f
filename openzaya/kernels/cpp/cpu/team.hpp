// The threads of one step: they walk through the layers together and wait for each other between phases.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>

namespace oz {

// Waiting threads spin for a while, which is what most waits take, and then sleep: with other work on the machine the
// thread that is waited for can then move to this core. To yield only would not let it: it is queued at its own core.
class Barrier {
  public:
    explicit Barrier(int size) : size_(size) {}

    void wait() {
        if (size_ == 1) return;
        const int generation = generation_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            generation_.store(generation + 1, std::memory_order_release);
            generation_.notify_all();
            return;
        }
        for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; spins++) {
            if (spins < SPINS) _mm_pause();
            else generation_.wait(generation, std::memory_order_acquire);
        }
    }

  private:
    static constexpr int SPINS = 8000;  // about a tenth of a millisecond
    int size_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> generation_{0};
};

struct Range {
    int64_t begin, end;
};

// Pieces of work that are taken by whoever is free. Threads meet a bag after the other in the same order; between two
// waits there may be BAGS / 2 - 1 of them, so one that is emptied for later use is never in use.
constexpr int BAGS = 16;
struct alignas(64) Bag {
    std::atomic<int64_t> taken{0};
};

struct Team {
    int index, size;
    Barrier* barrier;
    Bag* bags;
    mutable int turn = 0;

    void wait() const { barrier->wait(); }

    // This thread's share of `count` things that are cut at multiples of `unit` only.
    Range share(int64_t count, int64_t unit = 1) const {
        int64_t units = (count + unit - 1) / unit;
        int64_t begin = units * index / size * unit, end = units * (index + 1) / size * unit;
        return {begin < count ? begin : count, end < count ? end : count};
    }

    // Calls work(i) for each i below `count`, on some thread. A thread whose core does other work takes fewer.
    template <class Work>
    void each(int64_t count, Work work) const {
        std::atomic<int64_t>& taken = bags[turn % BAGS].taken;
        if (index == 0) bags[(turn + BAGS / 2) % BAGS].taken.store(0, std::memory_order_relaxed);
        turn++;
        for (int64_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
    }
};

}  // namespace oz
