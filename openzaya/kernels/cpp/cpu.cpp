// Inference on a CPU: one C function runs a whole step of the model for a batch of sequences.
//
// Plain C functions, called from openzaya/infer/cpu_runner.py. The twin of everything here is the model in PyTorch on
// the same pages (openzaya/infer/torch_runner.py); the twin of the packed products is openzaya/model/quantised.py.

#include <omp.h>

#include "cpu/draw.hpp"
#include "cpu/step.hpp"

using namespace oz;

namespace {

int64_t room_for(const Model& model, const Work& work, const Plan& plan) {
    return Buffers(model, work, plan.parts, nullptr).bytes;
}

uint8_t* aligned(uint8_t* p) { return (uint8_t*)((uintptr_t(p) + 63) / 64 * 64); }

template <class Body>
void with_team(int threads, Body body) {
    Bag bags[BAGS];
    int started = threads;
    Barrier* barrier = nullptr;
    // OpenMP may give fewer threads than asked for: the team is made of those that came.
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        {
            started = omp_get_num_threads();
            barrier = new Barrier(started);
        }
        body(Team{omp_get_thread_num(), started, barrier, bags});
    }
    delete barrier;
}

}  // namespace

extern "C" {

// Call once after loading: 0, or why the processor's tiles cannot be had.
int64_t cpu_prepare() {
#ifdef OZ_TILES
    return allow_tiles();
#else
    return 0;
#endif
}

// Runs the step; or returns, without doing anything, how many bytes of room it needs if there is less.
int64_t cpu_step(int threads, const Model* model, const Memory* memory, const Work* work) {
    const Plan plan = make_plan(*model, *work);
    const int64_t needed = room_for(*model, *work, plan) + 64;
    if (work->room_bytes < needed) return needed;
    const Buffers buffers(*model, *work, plan.parts, aligned(work->room));
    const Context context{*model, *memory, *work, plan, buffers};
    with_team(threads, [&](const Team& team) { run(context, team); });
    return 0;
}


// A token for each row of logits (rows, vocabulary), and its log-probability unless `logprobs` is null.
void cpu_draw(int threads, int64_t rows, int64_t vocabulary, const float* logits, const Drawing* drawings, int64_t* tokens,
              float* logprobs) {
    with_team(threads, [&](const Team& team) {
        team.each(rows, [&](int64_t i) {
            tokens[i] = draw_row(logits + i * vocabulary, vocabulary, drawings[i], logprobs ? logprobs + i : nullptr);
        });
    });
}

// The log-probability of one token of each row.
void cpu_logprobs(int threads, int64_t rows, int64_t vocabulary, const float* logits, const int64_t* tokens, float* logprobs) {
    with_team(threads, [&](const Team& team) {
        team.each(rows, [&](int64_t i) { logprobs[i] = logprob_row(logits + i * vocabulary, vocabulary, tokens[i]); });
    });
}

// y (tokens, rows) = x (tokens, columns) W^T of one matrix of a stack, for tests.
void cpu_product(int threads, const Matrix* matrix, int64_t expert, int64_t tokens, const float* x, float* y) {
    const int64_t columns = matrix->columns, padded = round_up(columns, GROUP), groups = padded / GROUP;
    std::vector<float> floats(size_t(tokens * (padded + SKEW) + 64)), scales(size_t(tokens * groups));
    std::vector<bf16> shorts(size_t(tokens * (padded + SKEW) + 64));
    std::vector<int8_t> bytes(size_t(tokens * padded + 64));
    std::vector<int32_t> sums(size_t(tokens * groups));
    const Activations a{columns, padded, floats.data(), shorts.data(), bytes.data(), scales.data(), sums.data()};
    for (int64_t t = 0; t < tokens; t++) a.put(t, x + t * columns);
    with_team(threads, [&](const Team& team) {
        multiply(team, {matrix, expert, a, {nullptr, nullptr, tokens}, {y, matrix->rows}});
    });
}

// Read `bytes` of memory once with each thread's share in order: seconds taken.
double cpu_read(int threads, const uint8_t* data, int64_t bytes) {
    const double start = omp_get_wtime();
    int64_t kept = 0;
    with_team(threads, [&](const Team& team) {
        const Range part = team.share(bytes / 256);
        Ints sums[4] = {all_ints(0), all_ints(0), all_ints(0), all_ints(0)};
        const Line ones = line_first(data, 0);
        for (int64_t i = part.begin; i < part.end; i++)
            for (int n = 0; n < 4; n++) {
                __builtin_prefetch(data + i * 256 + n * 64 + 4096);
                sums[n] = dot_small_bytes(sums[n], line(data + i * 256 + n * 64), ones);
            }
        float total = 0;
        for (int n = 0; n < 4; n++) total += sum(to_floats(sums[n]));
#pragma omp atomic
        kept += int64_t(total);
    });
    return omp_get_wtime() - start + (kept == 1 ? 1e-12 : 0.0);
}

}  // extern "C"
