// The functions of csrc/common/mma.cuh on the host, for tests, and what its users need of CUDA.
#pragma once
#include "cuda_bf16.h"
#include "cuda_runtime.h"

namespace jepa {

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

// What each lane of this warp brings; `use` sees all of it before any lane goes on.
template <class Value, class Use> void with_lanes(const Value& own, const Use& use) {
  static Value brought[32][32];
  const int warp = static_cast<int>(threadIdx.x / 32);
  brought[warp][threadIdx.x % 32] = own;
  Block::current()->meet(WARP + warp, 32, [] {});
  use(brought[warp]);
  Block::current()->meet(WARP + warp, 32, [] {});
}

template <bool transposed, class T> void load_matrices(uint32_t (&to)[4], const T* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fault("a row of a matrix that is not aligned");
  const int line = static_cast<int>(threadIdx.x % 32 / 4), pair = static_cast<int>(threadIdx.x % 4 * 2);
  with_lanes(row, [&](const T* const* rows) {
    for (int m = 0; m < 4; ++m) {
      T pairs[2];
      for (int i = 0; i < 2; ++i)
        pairs[i] = transposed ? rows[8 * m + pair + i][line] : rows[8 * m + line][pair + i];
      std::memcpy(&to[m], pairs, 4);
    }
  });
}

struct Operands {
  uint32_t a[4], b[2];
};
inline float value(const __nv_bfloat16& x) { return __bfloat162float(x); }
inline float value(const __half& x) { return __half2float(x); }
template <class T> float half_of(uint32_t pair, int which) {
  T halves[2];
  std::memcpy(halves, &pair, 4);
  return value(halves[which]);
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t first_b, uint32_t second_b) {
  const int line = static_cast<int>(threadIdx.x % 32 / 4), pair = static_cast<int>(threadIdx.x % 4 * 2);
  with_lanes(Operands{{a[0], a[1], a[2], a[3]}, {first_b, second_b}}, [&](const Operands* lanes) {
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) {
        const int column = pair + i % 2, lane = k % 8 / 2;
        const float x = half_of<T>(lanes[line * 4 + lane].a[i / 2 + k / 8 * 2], k % 2);
        d[i] += x * half_of<T>(lanes[column * 4 + lane].b[k / 8], k % 2);
      }
  });
}

} // namespace jepa
