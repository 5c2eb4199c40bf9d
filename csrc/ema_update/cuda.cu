// One launch for all tensors. A block takes one chunk: 16-byte accesses where the chunk's addresses allow,
// one of each in flight per thread, then the elements left over one by one.
#include "ema_update/ema_update.h"

#include "common/chunks.cuh"

namespace jepa {

constexpr int WIDTH = 4;

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

template <class Online, int n> struct Loaded {
  Pack<float, n> target;
  Pack<Online, n> online;
};

template <EmaForm form, class Online> struct Chunk {
  const EmaChunk c;
  const DType shadow_dtype;
  const Factors f;

  template <int n> __device__ Loaded<Online, n> load(int i) const {
    return {load_pack<n>(c.target + i), load_pack<n>(static_cast<const Online*>(c.online) + i)};
  }
  template <int n> __device__ void finish(Loaded<Online, n> x, int i) const {
#pragma unroll
    for (int k = 0; k < n; ++k) x.target.at[k] = mix<form>(x.target.at[k], widen(x.online.at[k]), f);
    store_pack(c.target + i, x.target);
    store_copy(c.shadow, shadow_dtype, i, x.target);
  }
};

__device__ double momentum_of(const EmaUpdateCudaParams& p) {
  if (!p.device_momentum) return p.momentum;
  return p.momentum_dtype == DType::f64 ? *static_cast<const double*>(p.device_momentum)
                                        : *static_cast<const float*>(p.device_momentum);
}

template <EmaForm form, class Online>
__global__ void __launch_bounds__(CHUNK_THREADS)
    ema_update_forward_cuda_kernel(const __grid_constant__ EmaUpdateCudaParams p) {
  const EmaChunk c = p.chunks[blockIdx.x];
  const Chunk<form, Online> chunk{c, p.shadow_dtype, Factors(momentum_of(p))};
  go_through<WIDTH, 1>(chunk, static_cast<int>(c.numel), aligned(c.target, c.online, c.shadow));
}

template <EmaForm form, class Online> static void launch_type(const EmaUpdateCudaParams& p) {
  launch("ema_update", ema_update_forward_cuda_kernel<form, Online>,
         {p.count, CHUNK_THREADS, 0, p.device, p.stream}, p);
}

template <EmaForm form> static void launch_form(const EmaUpdateCudaParams& p) {
  switch (p.online_dtype) {
  case DType::bf16:
    return launch_type<form, __nv_bfloat16>(p);
  case DType::f16:
    return launch_type<form, __half>(p);
  case DType::f32:
    return launch_type<form, float>(p);
  default:
    refuse(p.online_dtype);
  }
}

void ema_update_cuda(const EmaUpdateCudaParams& p) {
  switch (p.form) {
  case EmaForm::lerp:
    return launch_form<EmaForm::lerp>(p);
  case EmaForm::ijepa:
    return launch_form<EmaForm::ijepa>(p);
  case EmaForm::vjepa2:
    return launch_form<EmaForm::vjepa2>(p);
  }
}

} // namespace jepa
