// AdamW, the exponential moving average of the weights it moves and rounded copies of both, over many
// tensors.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"
#include "../common/dtype.h"

namespace jepa {

// g = grad / scale;  m <- m + (1 - beta1) (g - m);  v <- beta2 v + (1 - beta2) g^2
// p <- (1 - lr weight_decay) p - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
// target <- target + (1 - momentum) (p - target)
struct AdamwEmaTensor {
  float* param;
  const void* grad; // null: param, exp_avg and exp_avg_sq stay
  float *exp_avg, *exp_avg_sq;
  float* target;                       // or null
  void *online_shadow, *target_shadow; // copies of the new param and target, or null
  int64_t numel;
  DType grad_dtype, online_shadow_dtype, target_shadow_dtype;
  double step; // this one counted
};

struct AdamwEmaParams {
  const AdamwEmaTensor* tensors;
  int64_t count;
  double lr, weight_decay, momentum, beta1, beta2, eps;
  double scale; // negative to maximise
  int threads;
};

JEPA_DECLARE_CPU(adamw_ema_cpu, AdamwEmaParams)

// A run of elements of one tensor: the rows of an int64 [chunks, 9] table.
struct AdamwEmaChunk {
  float* param;
  const void* grad; // null: param, exp_avg and exp_avg_sq stay
  float *exp_avg, *exp_avg_sq;
  float* target;                       // or null
  void *online_shadow, *target_shadow; // or null
  const float* step;                   // this one counted
  int64_t numel;
};

struct AdamwEmaScalars {
  double lr, weight_decay, momentum;
};

struct AdamwEmaCudaParams {
  const AdamwEmaChunk* chunks; // on the device; one launch updates them all
  int64_t count;
  DType grad_dtype, online_shadow_dtype, target_shadow_dtype; // of every chunk that has one
  AdamwEmaScalars scalars;
  const AdamwEmaScalars* device_scalars; // read by the kernel instead of `scalars`, or null
  const float *grad_scale, *found_inf;   // on the device, or null
  double beta1, beta2;
  float eps;
  bool maximize;
  int device;
  void* stream;
};

void adamw_ema_cuda(const AdamwEmaCudaParams&); // throws std::runtime_error where the launch fails

} // namespace jepa
