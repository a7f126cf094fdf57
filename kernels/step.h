// What one fused step of a model is made of, as kernels/step.py fills it. Plain data; every pointer is the caller's.
#pragma once

#include "attention.h"
#include "int8.h"

namespace tandem {

struct LayerArgs {
    const float *input_norm, *post_norm;  // [hidden]
    const float *query_norm, *key_norm;   // [dim] or null
    Matrix qkv, output, gate_up, down;    // gate_up: 16 gate columns, then the 16 up columns that belong to them, and so on
    int64_t window;                       // 0: none
    int64_t fine_down;                    // 1: down's input in 15 bits
    float key_scale, value_scale;         // what 8-bit keys and values are divided by; 0: each row's own
    int64_t cache_layer;                  // which layer of the cache is this one's
};

struct ModelArgs {
    const LayerArgs* layers;
    int64_t num_layers, hidden, inner, heads, kv_heads, dim, half, max_positions, interleaved;
    const float *final_norm, *cos, *sin;
    Matrix head;
    const void* table;   // [vocabulary][hidden] float32 or bf16; null: the head's columns are the embeddings
    int64_t table_bf16, vocabulary;
    double eps;
};

struct StepArgs {
    const int64_t *token_ids, *positions, *slots;
    const int32_t *tables, *query_starts, *context_lens;
    int64_t tokens, sequences, table_stride;
    void* cache;  // layer 0 of block 0
    int64_t layer_stride, block_stride, num_blocks, block_size;  // strides in elements
    int64_t format, paired;  // of the cache: a KvFormat, and its order
    float* scales;           // of formats that have them: layer 0 of block 0
    int64_t scales_layer_stride, scales_block_stride;
    const int64_t* rows;                                                  // whose logits are wanted
    int64_t num_rows;
    const uint8_t* greedy;  // [num_rows] or null: 1 where only the largest logit is wanted
    int64_t* best;          // [num_rows]: for those its column, or -1 when the row is not finite; otherwise left alone
    float* logits;          // [num_rows][vocabulary]; rows that are greedy are not written
    void* workspace;
    int64_t threads;
};

}  // namespace tandem
