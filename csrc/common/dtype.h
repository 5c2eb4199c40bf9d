// Element types of tensors, as the kernels see them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace jepa {

enum class DType { f32, bf16, f16, f64, i64, i32, u8, other };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Ends a call with a type that no kernel is built for, rather than read its bytes as another's.
[[noreturn]] void refuse(DType type);

} // namespace jepa
