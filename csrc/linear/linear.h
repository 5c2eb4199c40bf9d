// Dense products of fp32 matrices: y = f(x W^T + b), f the identity or the exact GELU, and its gradients.
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

// out [rows, columns] = f(left right^T + bias), contiguous.
struct LinearMultiplyParams {
  LinearOperand left, right;
  const float* bias; // may be null
  int64_t bias_stride;
  bool gelu;
  float* kept; // what f is of, as out; may be null
  int64_t rows, columns, depth;
  float* panels;  // workspace [columns rounded up to MAX_COLUMNS, min(depth, CHUNK)]
  float* scratch; // workspace [threads, TILE_ROWS * min(depth, CHUNK)]
  float* out;
  int threads;
};

// out [columns] = the sum over rows of x [rows, columns], or of slopes = x gelu'(kept).
struct LinearSumParams {
  LinearOperand x;
  int64_t rows, columns;
  const float* kept; // contiguous; may be null
  float* slopes;     // as kept
  float* out;        // may be null
  int threads;
};

JEPA_DECLARE_CPU(linear_multiply_cpu, LinearMultiplyParams)
JEPA_DECLARE_CPU(linear_sum_cpu, LinearSumParams)

} // namespace jepa
