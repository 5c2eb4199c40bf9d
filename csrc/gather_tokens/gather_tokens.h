// Kept tokens of each image: out[row] = x[image of row, ids[row]], and the sum back.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"
#include "../common/dtype.h"
#include "../common/rows.h"

namespace jepa {

struct GatherTokensForwardParams {
  KeptRows at;
  const void* x;
  int64_t stride_image, stride_token, stride_channel; // of x, in elements
  void* out;                                          // [rows, channels]
  int64_t channels;
  int element_size; // bytes: 2, 4 or 8
  int threads;
};

struct GatherTokensBackwardParams {
  KeptRows at;
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
