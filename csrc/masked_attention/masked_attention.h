// Softmax attention inside each sequence, and its gradient.
#pragma once
#include <cstdint>

#include "common/dispatch.h"
#include "common/dtype.h"

namespace jepa {

// q, k, v, an output or a gradient: the element (row i of sequence s, head h, channel c) lies at
// data[s * sequence + i * row + h * head + c * channel]. On a packed axis, sequence is 0 and i counts from
// the first row of all.
struct AttentionRows {
  void* data;
  int64_t sequence, row, head, channel;
};

// Queries [first, first + count) of a sequence, for every head.
struct AttentionTask {
  int64_t sequence, first, count;
};

struct AttentionShape {
  const int32_t *cu_seqlens, *k_cu_seqlens; // [S + 1], or null: `queries` and `keys` rows in every sequence
  int64_t queries, keys, longest_keys;
  int64_t heads, key_heads, width; // key_heads divides heads; width: a multiple of 8, at most 128
  const AttentionTask* tasks;      // in the order in which threads take them
  int64_t task_count;
  float scale;
  DType dtype;
  int threads;
};

struct MaskedAttentionForwardParams {
  AttentionShape shape;
  AttentionRows q, k, v, out; // out is written at the tasks' rows
};

// A task holds all queries of its sequence.
struct MaskedAttentionBackwardParams {
  AttentionShape shape;
  AttentionRows grad, q, k, v, dq, dk, dv; // dq, dk, dv are written at the tasks' rows and keys
};

JEPA_DECLARE_CPU(masked_attention_forward_cpu, MaskedAttentionForwardParams)
JEPA_DECLARE_CPU(masked_attention_backward_cpu, MaskedAttentionBackwardParams)

} // namespace jepa
