// From an element type known at run time to a C++ type.
#pragma once
#include "common/dtype.h"

namespace jepa::JEPA_ISA {

// body(x), where only the type of x has a meaning: float, bf16 or f16.
template <class Body> static void with_float(DType type, Body body) {
  switch (type) {
  case DType::f32:
    return body(float{});
  case DType::bf16:
    return body(bf16{});
  case DType::f16:
    return body(f16{});
  default:
    refuse(type);
  }
}

// Before threads start: what one throws ends the process.
static inline void require_float(DType type) {
  with_float(type, [](auto) {});
}

} // namespace jepa::JEPA_ISA
