// In place of CUDA's header on the include path: what kernels name of it beyond the functions of csrc/common.
#pragma once
#include <cmath>

#include "common/hopper.cuh"

#define __shared__ static
#define __builtin_assume(fact) static_cast<void>(fact)

namespace jepa {

struct alignas(16) float4 {
  float x, y, z, w;
};

template <class T> T* aligned_address(T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) fault("an access that is not aligned");
  return p;
}
template <class T> T __ldcs(const T* p) { return *aligned_address(p); }
template <class T> T __ldg(const T* p) { return *aligned_address(p); }
// Asked of every address that a kernel then reads or writes without an intrinsic.
template <class T> bool __isGlobal(const T* p) { return aligned_address(p); }

inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }

} // namespace jepa
