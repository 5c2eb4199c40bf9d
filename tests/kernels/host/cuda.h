// What kernels without shared memory and barriers need of CUDA, on the host: their threads run one after
// another.
#pragma once
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "common/dtype.h"
#include "types.h"

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

namespace jepa {

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// The launch kernel<<<grid, block, 0, stream>>>(argument).
template <class Argument>
void launch_threads(void (*kernel)(Argument), dim3 grid, dim3 block, const Argument& argument) {
  const bool small = block.x <= 1024 && block.y <= 1024 && block.z <= 64;
  if (!small || block.x * block.y * block.z > 1024 || grid.y > 65535)
    throw std::runtime_error("a launch beyond CUDA's limits");
  if (PyGILState_Check())
    throw std::runtime_error("a launch, which may wait for the device, with Python's lock held");
  gridDim = grid;
  blockDim = block;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (threadIdx.z = 0; threadIdx.z < block.z; ++threadIdx.z)
        for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
          for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel(argument);
}

// A vector access faults where its address is no multiple of its size.
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
template <class T> T* aligned_address(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) throw std::runtime_error("misaligned address");
  return static_cast<T*>(const_cast<void*>(p));
}
inline uint4 __ldcs(const uint4* p) { return *aligned_address<uint4>(p); }

inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }

using cudaStream_t = void*;
inline int cudaGetLastError() { return 0; }
struct OnDevice {
  OnDevice(const char*, int) {}
  void check(int) const {}
};

} // namespace jepa
