// The predictor's sequences [context | mask tokens], written once, and the sums back.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"
#include "../common/dtype.h"

namespace jepa {

// Sequence s lies in rows start[s]..start[s + 1]: the tokens of context s % contexts, then its targets.
// Rows past the last sequence stand for nothing.
struct AssembledRows {
  const int64_t* start;         // [sequences + 1]
  const int64_t* context_start; // [contexts + 1], in rows of the context
  int64_t sequences, contexts, rows, context_rows;
  int64_t sequences_per_token; // that share a mask token
};

// Row j of sequence s is at data + offset[s] + j * stride, in elements.
struct SequenceRows {
  const void* data;
  const int64_t* offset;
  int64_t stride, stride_channel;
};

// Row i is at data + i * stride.
struct Table {
  const void* data;
  int64_t stride, stride_channel;
  DType dtype;
};

struct AssembleTokensForwardParams {
  AssembledRows at;
  SequenceRows context;
  const int64_t *context_ids, *target_ids; // null without positions
  const int64_t* target_start;             // [sequences + 1], in rows of target_ids
  int64_t targets;                         // rows of target_ids
  Table mask_token, pos_embed;
  int64_t tokens, count; // rows of the tables
  void* token_rows;      // workspace [tokens, channels] of at most 4 bytes each
  void* out;             // [rows, channels]
  int64_t channels;
  DType dtype; // of context and out
  int threads;
};

struct AssembleTokensBackwardParams {
  AssembledRows at;
  SequenceRows grad;
  void* dcontext;            // [context_rows, channels], or null
  float* dmask_token;        // [tokens, channels], or null
  const int64_t* first_part; // [sequences + 1]: the parts of sequence s, each of at most TARGET_PART targets
  float* parts;              // workspace [first_part[sequences], channels]
  int64_t tokens, channels;
  DType dtype; // of grad and dcontext
  int threads;
};

constexpr int64_t TARGET_PART =
    64; // rows summed by themselves: the order of sums is the same for any threads

JEPA_DECLARE_CPU(assemble_tokens_forward_cpu, AssembleTokensForwardParams)
JEPA_DECLARE_CPU(assemble_tokens_backward_cpu, AssembleTokensBackwardParams)

} // namespace jepa
