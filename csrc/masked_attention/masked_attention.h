// Softmax attention inside each sequence, and its gradient.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"
#include "../common/dtype.h"

namespace jepa {

// q, k, v, an output or a gradient: the element (row i of sequence s, head h, channel c) lies at
// data[s * sequence + i * row + h * head + c * channel]. On a packed axis, sequence is 0 and i counts from
// the first row of all; so it is in every struct below.
struct AttentionRows {
  void* data;
  int64_t sequence, row, head, channel;
};

// Rotary turns of the first `channels` channels of a row, the same for every head: cos [channels] at
// data[s * sequence + i * row], the signed sin [channels] behind it. data null: none.
struct AttentionTurns {
  const float* data;
  int64_t sequence, row, channels;
  bool half; // partners lie channels / 2 apart; else they are neighbours
};

// The half-open range of keys that a row sees: two numbers at data[s * sequence + i * row]. data null: all.
struct AttentionRanges {
  const int32_t* data;
  int64_t sequence, row;
};

// Queries [first, first + count) of a sequence, for every head.
struct AttentionTask {
  int64_t sequence, first, count;
};

struct AttentionShape {
  const int32_t *cu_seqlens, *k_cu_seqlens; // [S + 1], or null: `queries` and `keys` rows in every sequence
  int64_t queries, keys;
  int64_t most_queries, most_keys; // of a task, and of a sequence
  int64_t heads, key_heads, width; // key_heads divides heads; width: a multiple of 8, at most 128
  int64_t head_step;               // heads of keys that a thread takes at once
  int64_t frame_size;              // 0: none
  AttentionRanges ranges;
  AttentionTurns turns, k_turns;
  const AttentionTask* tasks; // in the order in which threads take them
  int64_t task_count;
  float scale;
  DType dtype;
  int threads;
};

// With n queries and m keys, query i stands at position m - n + i: how many of the first keys it sees.
static inline int64_t frame_end(int64_t position, int64_t frame_size, int64_t keys) {
  if (position < 0) return 0;
  const int64_t end = (position / frame_size + 1) * frame_size;
  return end < keys ? end : keys;
}

struct MaskedAttentionForwardParams {
  AttentionShape shape;
  AttentionRows q, k, v, out, lse; // out and lse (float, channel unused) are written at the tasks' rows
};

// A task of the shape holds all queries of its sequence. Large sequences come in parts instead: of queries,
// and (a part's numbers are of keys) of keys.
struct MaskedAttentionBackwardParams {
  AttentionShape shape;
  AttentionRows grad, q, k, v, dq, dk, dv; // dq, dk, dv are written at the rows and keys of tasks and parts
  const AttentionTask *query_parts, *key_parts;
  int64_t query_part_count, key_part_count, most_whole_keys;
  AttentionRows stats; // scratch for the parts: float, three of them a row, `channel` apart
};

JEPA_DECLARE_CPU(masked_attention_forward_cpu, MaskedAttentionForwardParams)
JEPA_DECLARE_CPU(masked_attention_backward_cpu, MaskedAttentionBackwardParams)

// A tensor that kernels fetch tiles from: `count` rows, in each of `sequences` planes. Address and strides
// are multiples of 16 bytes, channel is 1.
struct AttentionInput {
  AttentionRows at;
  int64_t sequences, count;
};

// The shape has no frames, ranges, turns or tasks; most_queries and most_keys, at most 256, bound the
// lengths. Rows of the packed axes behind the last sequence are written too: 0, and -inf in lse.
struct MaskedAttentionCudaParams {
  AttentionShape shape;
  int64_t sequences;
  AttentionInput q, k, v;
  AttentionRows out, lse;
  AttentionInput grad; // from here on: backward only
  AttentionRows dq, dk, dv;
  int device;
  void* stream;
};

void masked_attention_forward_cuda(
    const MaskedAttentionCudaParams&); // throw std::runtime_error where the launch
void masked_attention_backward_cuda(const MaskedAttentionCudaParams&); // fails

} // namespace jepa
