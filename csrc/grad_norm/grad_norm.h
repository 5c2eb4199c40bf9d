// The norm of many tensors together.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"
#include "../common/dtype.h"

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

// A run of elements of one tensor: the rows of an int64 [chunks, 2] table.
struct GradNormChunk {
  const void* grad;
  int64_t numel;
};

struct GradNormCudaParams {
  const GradNormChunk* chunks; // on the device
  int64_t count;
  DType dtype;     // of every chunk
  double* partial; // [count]: the sum of each chunk's squares
  int device;
  void* stream;
};

struct GradNormSumCudaParams {
  const double* partial; // [count]
  int64_t count;
  float* norm;
  int device;
  void* stream;
};

// Both throw std::runtime_error where the launch fails.
void grad_norm_cuda(const GradNormCudaParams&);
void grad_norm_sum_cuda(const GradNormSumCudaParams&);

} // namespace jepa
