// Dense products of fp32 matrices: y = x W^T + b, and its gradients.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"

namespace jepa {

// Sizes that every instruction set shares.
namespace linear {
constexpr int64_t TILE_ROWS = 96;   // rows of the result that are computed together
constexpr int64_t MAX_COLUMNS = 32; // the widest right panel
constexpr int64_t LEAST_ROWS = 12;  // of a thread
constexpr int64_t CHUNK = 1536;     // the most of the depth that is multiplied at a time: a tile stays in L2
} // namespace linear

// An operand, lane by lane (a row or a column of the result) and step by step of the depth.
struct LinearOperand {
  const float* x;
  int64_t lane, step; // strides
};

// out [rows, columns] = left right^T + bias, contiguous.
struct LinearMultiplyParams {
  LinearOperand left, right;
  const float* bias; // may be null
  int64_t bias_stride;
  int64_t rows, columns, depth;
  float* panels;  // workspace [columns rounded up to MAX_COLUMNS, min(depth, CHUNK)]
  float* scratch; // workspace [threads, TILE_ROWS * min(depth, CHUNK)]
  float* out;
  int threads;
};

// out [columns] = the sum over rows of x [rows, columns].
struct LinearSumParams {
  const float* x;
  int64_t row_stride, column_stride, rows, columns;
  float* out;
  int threads;
};

JEPA_DECLARE_CPU(linear_multiply_cpu, LinearMultiplyParams)
JEPA_DECLARE_CPU(linear_sum_cpu, LinearSumParams)

} // namespace jepa
