// Kept tokens of each image: out[row] = x[image of row, ids[row]], and the sum back.
#pragma once
#include <cstdint>

#include "common/dispatch.h"
#include "common/dtype.h"

namespace jepa {

// Rows lie in `sequences` runs; run s reads image s % batch. Runs end at cu_seqlens[1], cu_seqlens[2], ...,
// or are `run_length` long where cu_seqlens is null. Rows past the last run are written as 0.
struct GatherRows {
  const int64_t* ids;
  const int32_t* cu_seqlens;
  int64_t sequences, run_length, rows, batch, count; // count: tokens of an image; ids outside it give 0
};

struct GatherTokensForwardParams {
  GatherRows at;
  const void* x;
  int64_t stride_image, stride_token, stride_channel; // of x, in elements
  void* out;                                          // [rows, channels]
  int64_t channels;
  int element_size; // bytes: 2, 4 or 8
  int threads;
};

struct GatherTokensBackwardParams {
  GatherRows at;
  const void* grad;
  int64_t stride_run, stride_row,
      stride_channel; // of grad, in elements; stride_run only where runs have one length
  void* dx;           // [batch, count, channels], every element written
  int64_t channels;
  int32_t* first;  // workspace [batch * count + 1]: the rows that sum into token i are
                   // source[first[i]..first[i + 1])
  int32_t* source; // workspace [rows]
  DType dtype;
  int threads;
};

JEPA_DECLARE_CPU(gather_tokens_forward_cpu, GatherTokensForwardParams)
JEPA_DECLARE_CPU(gather_tokens_backward_cpu, GatherTokensBackwardParams)

} // namespace jepa
