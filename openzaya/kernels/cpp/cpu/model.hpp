// What the caller hands over: the model's matrices and vectors by address, the memory of all sequences, and a step's
// work. The same records are declared in Python (openzaya/infer/cpu_records.py; sequences are listed by cpu_runner.py); all
// fields are 8 bytes wide.
#pragma once

#include <cstdint>

namespace oz {

enum Format : int64_t { FLOAT32, BFLOAT16, INT8, INT4 };

constexpr int64_t LANES = 16;          // rows of a packed block, and floats of a line
constexpr int64_t GROUP = 64;          // columns that share a scale
constexpr int64_t BLOCK_TOKENS = 64;   // tokens of a cache block

// A matrix (rows, columns), or several of one shape `stride` bytes apart. FLOAT32 and BFLOAT16: row-major, as in the
// checkpoint. INT8 and INT4: packed (openzaya/model/quantised.py).
struct Matrix {
    const uint8_t* data;
    const uint8_t* scales;
    int64_t rows, columns, format, stride, scale_stride;
};

struct Layer {
    const float *input_norm, *attention_scale, *attention_bias, *attention_residual_scale, *attention_residual_bias;
    const float *mlp_norm, *mlp_scale, *mlp_bias, *mlp_residual_scale, *mlp_residual_bias;
    const float *depthwise;         // (C, k0)
    const float *convolution_constant;  // (C): the grouped bias, and what the depthwise bias contributes everywhere
    const float *temperature;       // (K)
    const float *router_scale;      // (R), null in the first layer
    const float *router_bias, *router_norm, *fc1_bias, *fc2_bias, *balancing;
    Matrix query, key, value_now, value_late, output, grouped;
    Matrix router_down, fc1, fc2, router_out;
    Matrix gate_up, down;
    int64_t window;                 // tokens seen, itself included; 0: all
    int64_t rotary;                 // which of the two tables of angles
};

struct Model {
    int64_t hidden, layers, query_heads, key_heads, head_dim, experts, width, router_width, kernel0, kernel1;
    int64_t vocabulary, rotary_half;
    double epsilon;
    const float *input_scale, *input_bias, *final_norm;
    const float *frequencies[2];    // (rotary_half) for full and for sliding layers
    Matrix embedding, head;
    const Layer* layer;
};

// Blocks of all layers and the CCA states. Per layer, block and head: keys as lines (d/g steps, 64 keys), values as
// lines (64/g steps, d), where g = 4 / bytes an element is what a lane holds. Scales (INT8): 64 floats a head.
struct Memory {
    uint8_t *keys, *values;
    float *key_scales, *value_scales;
    float *slots, *snapshots;       // (slot or block, layer, state)
    int64_t blocks, num_slots, format;
};

struct Sequence {
    int64_t first;                  // index of its first token in the step
    int64_t count, start, slot;
    const int32_t* blocks;
    int64_t logits_first, logits_count;  // rows of the result, for its last tokens
};

struct Work {
    int64_t tokens, sequences, logits_rows;
    const int32_t* token;           // (tokens)
    const Sequence* sequence;
    const uint8_t* forced;          // (tokens, layers), 255: not forced; or null
    uint8_t* experts;               // (tokens, layers)
    float* logits;                  // (logits_rows, vocabulary)
    uint8_t* room;
    int64_t room_bytes;
};

}  // namespace oz
