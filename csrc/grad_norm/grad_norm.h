// The norm of many tensors together.
#pragma once
#include <cstdint>

#include "common/dispatch.h"
#include "common/dtype.h"

namespace jepa {

// A run of elements of one tensor, and the sum of their squares.
struct GradNormBlock {
  const void* grad;
  int64_t numel;
  DType dtype;
  double squares;
};

struct GradNormParams {
  GradNormBlock* blocks;
  int64_t count;
  int threads;
};

JEPA_DECLARE_CPU(grad_norm_cpu, GradNormParams)

} // namespace jepa
