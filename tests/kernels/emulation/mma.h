// nvcuda::wmma on the host: the first lane of a warp holds its fragments whole and does its work.
#pragma once
#include "common/hopper.cuh"
#include "cuda_bf16.h"

#define __shared__ static

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
  float at[16][16];
};

inline bool idle() { return jepa::threadIdx.x % 32 != 0; }
inline float widened(float x) { return x; }
inline float widened(jepa::__nv_bfloat16 x) { return jepa::__bfloat162float(x); }
inline float widened(jepa::__half x) { return jepa::__half2float(x); }

template <class T> void check_tile(const T* p, unsigned stride) {
  if (reinterpret_cast<uintptr_t>(p) % 32 || stride * sizeof(T) % 16)
    jepa::fault("a tile that is not aligned");
}

template <class Fragment> void fill_fragment(Fragment& f, float value) {
  for (auto& row : f.at) std::fill(row, row + 16, value);
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* p, unsigned stride) {
  check_tile(p, stride);
  constexpr bool rows = std::is_same_v<Layout, row_major>;
  if (idle()) return;
  for (unsigned i = 0; i < 16; ++i)
    for (unsigned j = 0; j < 16; ++j) f.at[i][j] = widened(rows ? p[i * stride + j] : p[j * stride + i]);
}

template <class Sums, class A, class B> void mma_sync(Sums& d, const A& a, const B& b, const Sums& c) {
  if (idle()) return;
  d = c;
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 16; ++j) d.at[i][j] += a.at[i][k] * b.at[k][j];
}

template <class Sums> void store_matrix_sync(float* p, const Sums& f, unsigned stride, layout_t) {
  check_tile(p, stride);
  if (idle()) return;
  for (int i = 0; i < 16; ++i) std::copy_n(f.at[i], 16, p + i * stride);
}

} // namespace nvcuda::wmma

namespace jepa {

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
template <class T> T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) fault("a load that is not aligned");
  return *p;
}
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline void __syncwarp() {
  Block::current()->meet(WARP + static_cast<int>(threadIdx.x / 32), 32, [] {});
}

} // namespace jepa
