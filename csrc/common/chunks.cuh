// How a block goes through its chunk of each of several tensors: 16 bytes an access of the widest where all
// addresses allow, then element by element.
#pragma once
#include <cstdint>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <type_traits>

#include "common/dtype.h"
#include "common/floats.cuh"
#include "common/hopper_host.cuh"

namespace jepa {

constexpr int CHUNK_THREADS = 256;

template <class T, int n> struct Pack {
  T at[n];
};

template <class T, int n>
using Word = std::conditional_t<
    n == 1, T,
    std::conditional_t<n * sizeof(T) == 16, float4, std::conditional_t<n * sizeof(T) == 8, float2, void>>>;

// Said of addresses that come out of memory: the compiler would send them through the slower generic path.
template <class T> __device__ T* global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

// `streaming`: marked as first to leave the cache, for kernels that only read.
template <int n, bool streaming = false, class T> __device__ Pack<T, n> load_pack(const T* p) {
  const auto* words = global(reinterpret_cast<const Word<T, n>*>(p));
  const Word<T, n> word = streaming ? __ldcs(words) : *words;
  Pack<T, n> pack;
  memcpy(&pack, &word, sizeof(pack));
  return pack;
}
template <class T, int n> __device__ void store_pack(T* p, const Pack<T, n>& pack) {
  Word<T, n> word;
  memcpy(&word, &pack, sizeof(pack));
  *global(reinterpret_cast<Word<T, n>*>(p)) = word;
}

template <class T, int n> __device__ void store_as(void* to, int i, const Pack<float, n>& x) {
  Pack<T, n> rounded;
#pragma unroll
  for (int k = 0; k < n; ++k) narrow(x.at[k], rounded.at[k]);
  store_pack(static_cast<T*>(to) + i, rounded);
}

// Elements i to i + n - 1 of a copy, if there is one. Its type is the same for a whole launch.
template <int n> __device__ void store_copy(void* to, DType type, int i, const Pack<float, n>& x) {
  if (!to) return;
  if (type == DType::bf16)
    store_as<__nv_bfloat16>(to, i, x);
  else if (type == DType::f16)
    store_as<__half>(to, i, x);
  else
    store_as<float>(to, i, x);
}

template <class... Pointer> __device__ bool aligned(Pointer... to) {
  return (reinterpret_cast<uintptr_t>(to) | ...) % 16 == 0;
}

// elements.load<n>(i) and elements.finish<n>(loaded, i) for all elements, `width` at a time where `aligned`;
// as many as `unroll` loads come before the first is finished.
template <int width, int unroll, class Elements>
__device__ void go_through(Elements& elements, int numel, bool aligned) {
  const int whole = aligned ? numel / width * width : 0;
  for (int i = threadIdx.x * width; i < whole; i += unroll * width * CHUNK_THREADS) {
    decltype(elements.template load<width>(0)) loaded[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u)
      if (const int at = i + u * width * CHUNK_THREADS; at < whole)
        loaded[u] = elements.template load<width>(at);
#pragma unroll
    for (int u = 0; u < unroll; ++u)
      if (const int at = i + u * width * CHUNK_THREADS; at < whole)
        elements.template finish<width>(loaded[u], at);
  }
  for (int i = whole + threadIdx.x; i < numel; i += CHUNK_THREADS)
    elements.template finish<1>(elements.template load<1>(i), i);
}

} // namespace jepa
