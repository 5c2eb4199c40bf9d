// One pass over memory: read target and online, write target and its shadow (12 bytes a parameter in fp32).
#include "ema_update/ema_update.h"

#include "common/floats.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace jepa::JEPA_ISA {

// The factors as the published loops hand them to fp32 tensors: computed in double, rounded once.
struct Factors {
  vf keep, step;
};

template <EmaForm form> static inline vf mix(vf target, vf online, Factors f) {
  if constexpr (form == EmaForm::lerp) return fma(f.step, sub(online, target), target);
  if constexpr (form == EmaForm::ijepa) return add(mul(f.keep, target), mul(f.step, online));
  return fma(f.step, online, mul(f.keep, target));
}

template <EmaForm form, class Online, class Shadow>
static void update_range(float* target, const Online* online, Shadow* shadow, int64_t n, Factors f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vf x = mix<form>(load(target + i), load(online + i), f);
    store(target + i, x);
    if (shadow) store(shadow + i, x);
  }
  if (const int rest = static_cast<int>(n - i)) {
    const vf x = mix<form>(load(target + i, rest), load(online + i, rest), f);
    store(target + i, x, rest);
    if (shadow) store(shadow + i, x, rest);
  }
}

template <EmaForm form, class Online>
static void update_online(const EmaTensor& t, int64_t begin, int64_t n, Factors f) {
  float* target = t.target + begin;
  const Online* online = static_cast<const Online*>(t.online) + begin;
  if (t.shadow && t.shadow_dtype == DType::bf16)
    return update_range<form>(target, online, static_cast<bf16*>(t.shadow) + begin, n, f);
  if (t.shadow && t.shadow_dtype == DType::f16)
    return update_range<form>(target, online, static_cast<f16*>(t.shadow) + begin, n, f);
  update_range<form>(target, online, t.shadow ? static_cast<float*>(t.shadow) + begin : nullptr, n, f);
}

template <EmaForm form> static void update(const EmaTensor& t, int64_t begin, int64_t n, Factors f) {
  with_float(t.online_dtype, [&](auto x) { update_online<form, decltype(x)>(t, begin, n, f); });
}

static void require_float(DType type) {
  if (type != DType::f32 && type != DType::bf16 && type != DType::f16) refuse(type);
}

// Threads share the parameters as one long axis: each takes a contiguous share of all elements.
void ema_update_cpu(const EmaUpdateParams& p) {
  int64_t total = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    total += p.tensors[i].numel;
    require_float(p.tensors[i].online_dtype);
    require_float(p.tensors[i].shadow_dtype);
  }
  const Factors f{set1(static_cast<float>(p.momentum)), set1(static_cast<float>(1.0 - p.momentum))};
  constexpr int64_t WORTH_A_THREAD = 1 << 14;
  const int64_t useful = total / WORTH_A_THREAD + 1;
  const int threads = useful < p.threads ? static_cast<int>(useful) : p.threads;
  parallel_for(total, threads, [&](int64_t begin, int64_t end) {
    int64_t start = 0; // of tensor i on the common axis
    for (int64_t i = 0; i < p.count && start < end; start += p.tensors[i++].numel) {
      const EmaTensor& t = p.tensors[i];
      const int64_t from = begin > start ? begin - start : 0;
      const int64_t to = end - start < t.numel ? end - start : t.numel;
      if (from >= to) continue;
      switch (p.form) {
      case EmaForm::lerp:
        update<EmaForm::lerp>(t, from, to - from, f);
        break;
      case EmaForm::ijepa:
        update<EmaForm::ijepa>(t, from, to - from, f);
        break;
      case EmaForm::vjepa2:
        update<EmaForm::vjepa2>(t, from, to - from, f);
        break;
      }
    }
  });
}

} // namespace jepa::JEPA_ISA
