// One launch for all tensors. A block takes one chunk: 16-byte accesses where the chunk's addresses allow,
// four of each in flight per thread, then the elements left over one by one.
#include "ema_update/ema_update.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/floats.cuh"

namespace jepa {

constexpr int THREADS = 256;
constexpr int UNROLL = 4;

// The factors as the published loops hand them to fp32 tensors: computed in double, rounded once.
struct Factors {
  float keep, step;
  __device__ explicit Factors(double m) : keep(static_cast<float>(m)), step(static_cast<float>(1.0 - m)) {}
};

// Written with rounding intrinsics, which the compiler neither fuses nor splits.
template <EmaForm form> __device__ float mix(float target, float online, Factors f) {
  if constexpr (form == EmaForm::lerp) return __fmaf_rn(f.step, __fsub_rn(online, target), target);
  if constexpr (form == EmaForm::ijepa)
    return __fadd_rn(__fmul_rn(f.keep, target), __fmul_rn(f.step, online));
  return __fmaf_rn(f.step, online, __fmul_rn(f.keep, target));
}

struct None {}; // no shadow

template <class T> struct Quad {
  T v[4];
};

// Streaming accesses: each byte is used once, and the weights are larger than the cache. Named as intrinsics
// also because the compiler would send addresses that come out of memory through the slower generic path.
template <class T> using Word = std::conditional_t<sizeof(T) == 4, float4, float2>;

template <class T> __device__ Quad<T> load_quad(const T* p) {
  const Word<T> word = __ldcs(reinterpret_cast<const Word<T>*>(p));
  Quad<T> quad;
  memcpy(&quad, &word, sizeof(quad));
  return quad;
}
template <class T> __device__ void store_quad(T* p, const Quad<T>& quad) {
  Word<T> word;
  memcpy(&word, &quad, sizeof(quad));
  __stcs(reinterpret_cast<Word<T>*>(p), word);
}

template <EmaForm form, class Online, class Shadow> struct Chunk {
  float* target;
  const Online* online;
  Shadow* shadow;
  Factors f;

  // Elements [i, i + 4), and so on at a distance of the whole block.
  __device__ void update_quads(int64_t i, int64_t end) const {
    Quad<float> t[UNROLL];
    Quad<Online> o[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (const int64_t at = i + u * 4 * THREADS; at < end) {
        t[u] = load_quad(target + at);
        o[u] = load_quad(online + at);
      }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (const int64_t at = i + u * 4 * THREADS; at < end) {
#pragma unroll
        for (int k = 0; k < 4; ++k) t[u].v[k] = mix<form>(t[u].v[k], widen(o[u].v[k]), f);
        store_quad(target + at, t[u]);
        if constexpr (!std::is_same_v<Shadow, None>) {
          Quad<Shadow> s;
#pragma unroll
          for (int k = 0; k < 4; ++k) narrow(t[u].v[k], s.v[k]);
          store_quad(shadow + at, s);
        }
      }
  }

  __device__ void update_one(int64_t i) const {
    const float x = mix<form>(__ldcs(target + i), widen(__ldcs(online + i)), f);
    __stcs(target + i, x);
    if constexpr (!std::is_same_v<Shadow, None>) {
      Shadow s;
      narrow(x, s);
      __stcs(shadow + i, s);
    }
  }
};

__device__ double momentum_of(const EmaUpdateCudaParams& p) {
  if (!p.device_momentum) return p.momentum;
  return p.momentum_dtype == DType::f64 ? *static_cast<const double*>(p.device_momentum)
                                        : *static_cast<const float*>(p.device_momentum);
}

template <EmaForm form, class Online, class Shadow>
__global__ void __launch_bounds__(THREADS)
    ema_update_forward_cuda_kernel(const __grid_constant__ EmaUpdateCudaParams p) {
  const EmaChunk c = p.chunks[blockIdx.x];
  const Chunk<form, Online, Shadow> chunk{c.target, static_cast<const Online*>(c.online),
                                          static_cast<Shadow*>(c.shadow), Factors(momentum_of(p))};
  const auto addresses = reinterpret_cast<uintptr_t>(c.target) | reinterpret_cast<uintptr_t>(c.online) |
                         reinterpret_cast<uintptr_t>(c.shadow);
  const int64_t quads = addresses % 16 == 0 ? c.numel / 4 * 4 : 0;
  for (int64_t i = threadIdx.x * 4; i < quads; i += UNROLL * 4 * THREADS) chunk.update_quads(i, quads);
  for (int64_t i = quads + threadIdx.x; i < c.numel; i += THREADS) chunk.update_one(i);
}

template <EmaForm form, class Online, class Shadow> static void launch(const EmaUpdateCudaParams& p) {
  ema_update_forward_cuda_kernel<form, Online, Shadow>
      <<<static_cast<unsigned>(p.count), THREADS, 0, static_cast<cudaStream_t>(p.stream)>>>(p);
}

template <EmaForm form, class Online> static void launch_shadow(const EmaUpdateCudaParams& p) {
  switch (p.shadow_dtype) {
  case DType::f32:
    return launch<form, Online, float>(p);
  case DType::bf16:
    return launch<form, Online, __nv_bfloat16>(p);
  case DType::f16:
    return launch<form, Online, __half>(p);
  case DType::other:
    return launch<form, Online, None>(p);
  default:
    refuse(p.shadow_dtype);
  }
}

template <EmaForm form> static void launch_online(const EmaUpdateCudaParams& p) {
  switch (p.online_dtype) {
  case DType::bf16:
    return launch_shadow<form, __nv_bfloat16>(p);
  case DType::f16:
    return launch_shadow<form, __half>(p);
  case DType::f32:
    return launch_shadow<form, float>(p);
  default:
    refuse(p.online_dtype);
  }
}

static void launch_form(const EmaUpdateCudaParams& p) {
  switch (p.form) {
  case EmaForm::lerp:
    return launch_online<EmaForm::lerp>(p);
  case EmaForm::ijepa:
    return launch_online<EmaForm::ijepa>(p);
  case EmaForm::vjepa2:
    return launch_online<EmaForm::vjepa2>(p);
  }
}

static void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("ema_update: the CUDA launch must succeed, got ") +
                           cudaGetErrorString(status) +
                           "; rerun with CUDA_LAUNCH_BLOCKING=1 to find the cause");
}

void ema_update_cuda(const EmaUpdateCudaParams& p) {
  if (p.count == 0) return;
  int before = 0;
  check(cudaGetDevice(&before));
  check(cudaSetDevice(p.device));
  launch_form(p);
  const cudaError_t launched = cudaGetLastError();
  check(cudaSetDevice(before));
  check(launched);
}

} // namespace jepa
