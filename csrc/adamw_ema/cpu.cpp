// One pass over memory: 28 bytes a parameter for AdamW, 8 for the target, 2 for each shadow. Nothing is kept
// between the elements, so that the bits depend neither on the threads nor on where a tensor begins.
#include "adamw_ema/adamw_ema.h"

#include "common/copy.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace jepa::JEPA_ISA {

// What all elements of a tensor share, computed in double and rounded once.
struct Factors {
  vf scale, pull, keep_square, new_square, decay, size, correction, eps, new_target;
  bool scaled, from_grad;
};

static vf rounded_once(double x) { return set1(static_cast<float>(x)); }

static Factors factors_of(const AdamwEmaParams& p, double step) {
  const double first = 1.0 - __builtin_pow(p.beta1, step), second = 1.0 - __builtin_pow(p.beta2, step);
  Factors f;
  f.scale = rounded_once(p.scale);
  // Interpolated from the nearer end, as torch does: exact at both.
  f.from_grad = p.beta1 < 0.5;
  f.pull = rounded_once(f.from_grad ? p.beta1 : 1.0 - p.beta1);
  f.keep_square = rounded_once(p.beta2);
  f.new_square = rounded_once(1.0 - p.beta2);
  f.decay = rounded_once(1.0 - p.lr * p.weight_decay);
  f.size = rounded_once(-p.lr / first);
  f.correction = rounded_once(1.0 / __builtin_sqrt(second));
  f.eps = rounded_once(p.eps);
  f.new_target = rounded_once(1.0 - p.momentum);
  f.scaled = p.scale != 1.0;
  return f;
}

template <class T> static inline vf load_first(const T* p, int n) { return n == W ? load(p) : load(p, n); }

// A copy is written and not read: past the cache where that pays and its address allows.
template <class T> static inline void copy_to(T* p, vf x, int n, bool streamed) {
  if (streamed && n == W && reinterpret_cast<uintptr_t>(p) % (W * sizeof(T)) == 0)
    stream(p, x);
  else
    store_first(p, x, n);
}

static inline void shadow_to(void* shadow, DType type, int64_t i, vf x, int n, bool streamed) {
  if (type == DType::bf16)
    copy_to(static_cast<bf16*>(shadow) + i, x, n, streamed);
  else
    copy_to(static_cast<f16*>(shadow) + i, x, n, streamed);
}

// The new value of n <= W elements from i on.
template <class Grad>
static inline vf adamw(const AdamwEmaTensor& t, const Grad* grad, const Factors& f, int64_t i, int n) {
  const vf read = load_first(grad + i, n), g = f.scaled ? div(read, f.scale) : read;
  const vf old_m = load_first(t.exp_avg + i, n), old_v = load_first(t.exp_avg_sq + i, n);
  const vf m = f.from_grad ? fma(f.pull, sub(old_m, g), g) : fma(f.pull, sub(g, old_m), old_m);
  const vf v = fma(mul(f.new_square, g), g, mul(f.keep_square, old_v));
  store_first(t.exp_avg + i, m, n);
  store_first(t.exp_avg_sq + i, v, n);
  const vf p =
      fma(f.size, div(m, fma(vsqrt(v), f.correction, f.eps)), mul(f.decay, load_first(t.param + i, n)));
  store_first(t.param + i, p, n);
  return p;
}

template <class Grad>
static inline void update(const AdamwEmaTensor& t, const Factors& f, bool streamed, int64_t i, int n) {
  const Grad* grad = static_cast<const Grad*>(t.grad);
  const vf p = grad ? adamw(t, grad, f, i, n) : load_first(t.param + i, n);
  if (t.online_shadow) shadow_to(t.online_shadow, t.online_shadow_dtype, i, p, n, streamed);
  if (!t.target) return;
  const vf old = load_first(t.target + i, n), k = fma(f.new_target, sub(p, old), old);
  store_first(t.target + i, k, n);
  if (t.target_shadow) shadow_to(t.target_shadow, t.target_shadow_dtype, i, k, n, streamed);
}

// Elements [begin, end) of one tensor.
static void update_range(const AdamwEmaTensor& t, const Factors& f, bool streamed, int64_t begin,
                         int64_t end) {
  with_float(t.grad_dtype, [&](auto x) {
    using Grad = decltype(x);
    int64_t i = begin;
    for (; i + W <= end; i += W) update<Grad>(t, f, streamed, i, W);
    if (i < end) update<Grad>(t, f, streamed, i, static_cast<int>(end - i));
  });
}

// Threads share the parameters as one long axis: each takes a contiguous share of all elements.
void adamw_ema_cpu(const AdamwEmaParams& p) {
  int64_t total = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    require_float(p.tensors[i].grad_dtype);
    total += p.tensors[i].numel;
  }
  constexpr int64_t WORTH_A_THREAD = 1 << 13;
  const int64_t useful = total / WORTH_A_THREAD + 1;
  const int threads = useful < p.threads ? static_cast<int>(useful) : p.threads;
  const bool streamed = total * static_cast<int64_t>(sizeof(float)) > STREAM_BYTES;
  parallel_for(total, threads, [&](int64_t begin, int64_t end) {
    double step = 0;
    Factors f = factors_of(p, 1);
    int64_t start = 0; // of tensor i on the common axis
    for (int64_t i = 0; i < p.count && start < end; start += p.tensors[i++].numel) {
      const AdamwEmaTensor& t = p.tensors[i];
      const int64_t from = begin > start ? begin - start : 0;
      const int64_t to = end - start < t.numel ? end - start : t.numel;
      if (from >= to) continue;
      if (t.grad && t.step != step) f = factors_of(p, step = t.step);
      update_range(t, f, streamed, from, to);
    }
    if (streamed) _mm_sfence();
  });
}

} // namespace jepa::JEPA_ISA
