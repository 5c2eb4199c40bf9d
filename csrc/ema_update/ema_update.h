// target <- momentum * target + (1 - momentum) * online, over many tensors in one call.
#pragma once
#include <cstdint>

#include "common/dispatch.h"
#include "common/dtype.h"

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

} // namespace jepa
