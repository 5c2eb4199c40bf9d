// One launch for all tensors of the same dtypes: a block takes one chunk, 28 bytes a parameter for AdamW,
// 8 for the target, 2 for each shadow. Its roundings are those of cpu.cpp.
#include "adamw_ema/adamw_ema.h"

#include "common/chunks.cuh"

namespace jepa {

constexpr int WIDTH = 4;

// By squaring: exponents are whole.
__device__ double power(double base, float exponent) {
  double result = 1.0;
  for (int n = static_cast<int>(exponent); n > 0; n >>= 1, base *= base)
    if (n & 1) result *= base;
  return result;
}

// What all elements of a chunk share, computed in double and rounded once.
struct Factors {
  bool moves, from_grad;
  float scale, pull, keep_square, new_square, decay, size, correction, eps, new_target;

  __device__ Factors(const AdamwEmaCudaParams& p, const AdamwEmaChunk& c)
      : moves(c.grad && !(p.found_inf && *p.found_inf != 0)), from_grad(p.beta1 < 0.5), eps(p.eps) {
    const AdamwEmaScalars s = p.device_scalars ? *p.device_scalars : p.scalars;
    new_target = static_cast<float>(1.0 - s.momentum);
    if (!moves) return;
    scale = (p.maximize ? -1.0f : 1.0f) * (p.grad_scale ? *p.grad_scale : 1.0f);
    // Interpolated from the nearer end, as torch does: exact at both.
    pull = static_cast<float>(from_grad ? -p.beta1 : 1.0 - p.beta1);
    keep_square = static_cast<float>(p.beta2);
    new_square = static_cast<float>(1.0 - p.beta2);
    decay = static_cast<float>(1.0 - s.lr * s.weight_decay);
    const float step = __ldg(c.step);
    size = static_cast<float>(-s.lr / (1.0 - power(p.beta1, step)));
    correction = static_cast<float>(1.0 / sqrt(1.0 - power(p.beta2, step)));
  }
};

template <class Grad, int n> struct Loaded {
  Pack<float, n> param, exp_avg, exp_avg_sq, target;
  Pack<Grad, n> grad;
};

template <class Grad> struct Chunk {
  const AdamwEmaCudaParams& p;
  const AdamwEmaChunk c;
  const Factors f;

  template <int n> __device__ Loaded<Grad, n> load(int i) const {
    Loaded<Grad, n> x;
    x.param = load_pack<n>(c.param + i);
    if (f.moves) {
      x.grad = load_pack<n>(static_cast<const Grad*>(c.grad) + i);
      x.exp_avg = load_pack<n>(c.exp_avg + i);
      x.exp_avg_sq = load_pack<n>(c.exp_avg_sq + i);
    }
    if (c.target) x.target = load_pack<n>(c.target + i);
    return x;
  }

  // Written with rounding intrinsics, which the compiler neither fuses nor splits.
  __device__ void move(float& p, float g, float& m, float& v) const {
    g = f.scale == 1.0f ? g : __fdiv_rn(g, f.scale);
    m = __fmaf_rn(f.pull, __fsub_rn(g, m), f.from_grad ? g : m);
    v = __fmaf_rn(__fmul_rn(f.new_square, g), g, __fmul_rn(f.keep_square, v));
    const float root = __fmaf_rn(__fsqrt_rn(v), f.correction, f.eps);
    p = __fmaf_rn(f.size, __fdiv_rn(m, root), __fmul_rn(f.decay, p));
  }

  template <int n> __device__ void finish(Loaded<Grad, n> x, int i) const {
    if (f.moves) {
#pragma unroll
      for (int k = 0; k < n; ++k)
        move(x.param.at[k], widen(x.grad.at[k]), x.exp_avg.at[k], x.exp_avg_sq.at[k]);
      store_pack(c.param + i, x.param);
      store_pack(c.exp_avg + i, x.exp_avg);
      store_pack(c.exp_avg_sq + i, x.exp_avg_sq);
    }
    store_copy(c.online_shadow, p.online_shadow_dtype, i, x.param);
    if (!c.target) return;
#pragma unroll
    for (int k = 0; k < n; ++k)
      x.target.at[k] = __fmaf_rn(f.new_target, __fsub_rn(x.param.at[k], x.target.at[k]), x.target.at[k]);
    store_pack(c.target + i, x.target);
    store_copy(c.target_shadow, p.target_shadow_dtype, i, x.target);
  }
};

template <class Grad>
__global__ void __launch_bounds__(CHUNK_THREADS, 4)
    adamw_ema_forward_cuda_kernel(const __grid_constant__ AdamwEmaCudaParams p) {
  const AdamwEmaChunk c = p.chunks[blockIdx.x];
  const Chunk<Grad> chunk{p, c, Factors(p, c)};
  go_through<WIDTH, 1>(
      chunk, static_cast<int>(c.numel),
      aligned(c.param, c.grad, c.exp_avg, c.exp_avg_sq, c.target, c.online_shadow, c.target_shadow));
}

template <class Grad> static void launch_type(const AdamwEmaCudaParams& p) {
  launch("adamw_ema", adamw_ema_forward_cuda_kernel<Grad>, {p.count, CHUNK_THREADS, 0, p.device, p.stream},
         p);
}

void adamw_ema_cuda(const AdamwEmaCudaParams& p) {
  switch (p.grad_dtype) {
  case DType::f32:
    return launch_type<float>(p);
  case DType::bf16:
    return launch_type<__nv_bfloat16>(p);
  case DType::f16:
    return launch_type<__half>(p);
  default:
    refuse(p.grad_dtype);
  }
}

} // namespace jepa
