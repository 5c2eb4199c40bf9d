// target <- momentum * target + (1 - momentum) * online, over many tensors in one call.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"
#include "../common/dtype.h"

namespace jepa {

// Roundings: lerp  fma(1 - m, online - target, target)
//            ijepa round(m * target) + round((1 - m) * online), rounded
//            vjepa2 fma(1 - m, online, round(m * target))
enum class EmaForm { lerp, ijepa, vjepa2 };

struct EmaTensor {
  float* target;
  const void* online;
  void* shadow; // low-precision copy of the new target, or null
  int64_t numel;
  DType online_dtype, shadow_dtype;
};

struct EmaUpdateParams {
  const EmaTensor* tensors;
  int64_t count;
  double momentum;
  EmaForm form;
  int threads;
};

JEPA_DECLARE_CPU(ema_update_cpu, EmaUpdateParams)

// A run of elements of one tensor. 32 bytes: the rows of an int64 [chunks, 4] table.
struct EmaChunk {
  float* target;
  const void* online;
  void* shadow; // or null
  int64_t numel;
};

struct EmaUpdateCudaParams {
  const EmaChunk* chunks; // on the device; one launch updates them all
  int64_t count;
  DType online_dtype, shadow_dtype; // of every chunk; shadow_dtype is `other` where there is no shadow
  double momentum;
  const void* device_momentum; // read by the kernel instead of `momentum`, or null
  DType momentum_dtype;        // f64 or f32, of device_momentum
  EmaForm form;
  int device;
  void* stream;
};

void ema_update_cuda(const EmaUpdateCudaParams&); // throws std::runtime_error where the launch fails

} // namespace jepa
