// One pass over memory: read target and online, write target and its shadow (12 bytes a parameter in fp32).
#include "ema_update/ema_update.h"

#include "common/copy.h"
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

struct None {}; // no shadow
template <class Shadow> constexpr bool is_written = true;
template <> constexpr bool is_written<None> = false;

template <EmaForm form, class Online, class Shadow> struct Range {
  float* target;
  const Online* online;
  Shadow* shadow;
  int64_t n;
  Factors f;

  template <bool streamed> void update(int64_t i) const {
    const vf x = mix<form>(load(target + i), load(online + i), f);
    store(target + i, x);
    if constexpr (is_written<Shadow> && streamed) stream(shadow + i, x);
    if constexpr (is_written<Shadow> && !streamed) store(shadow + i, x);
  }

  void update_some(int64_t i, int count) const {
    const vf x = mix<form>(load(target + i, count), load(online + i, count), f);
    store(target + i, x, count);
    if constexpr (is_written<Shadow>) store(shadow + i, x, count);
  }

  template <bool streamed> void update_all() const {
    int64_t i = 0;
    if constexpr (streamed) { // from the first address on that is aligned
      const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(shadow) / sizeof(Shadow) % W);
      if (past) i = W - past < n ? W - past : n;
      if (i) update_some(0, static_cast<int>(i));
    }
    for (; i + W <= n; i += W) update<streamed>(i);
    if (i < n) update_some(i, static_cast<int>(n - i));
  }
};

// Elements [begin, begin + n) of a tensor. The shadow is never read: streamed, it need not be fetched either.
struct Share {
  const EmaTensor& t;
  int64_t begin, n;
  Factors f;
  bool streamed;
};

template <EmaForm form, class Online, class Shadow> static void update_range(const Share& s) {
  const Range<form, Online, Shadow> range{s.t.target + s.begin,
                                          static_cast<const Online*>(s.t.online) + s.begin,
                                          static_cast<Shadow*>(s.t.shadow) + s.begin, s.n, s.f};
  if (is_written<Shadow> && s.streamed)
    range.template update_all<is_written<Shadow>>();
  else
    range.template update_all<false>();
}

template <EmaForm form> static void update(const Share& s) {
  with_float(s.t.online_dtype, [&](auto x) {
    using Online = decltype(x);
    if (!s.t.shadow) return update_range<form, Online, None>(s);
    with_float(s.t.shadow_dtype, [&](auto y) { update_range<form, Online, decltype(y)>(s); });
  });
}

static void update(EmaForm form, const Share& s) {
  switch (form) {
  case EmaForm::lerp:
    return update<EmaForm::lerp>(s);
  case EmaForm::ijepa:
    return update<EmaForm::ijepa>(s);
  case EmaForm::vjepa2:
    return update<EmaForm::vjepa2>(s);
  }
}

// Threads share the parameters as one long axis: each takes a contiguous share of all elements.
void ema_update_cpu(const EmaUpdateParams& p) {
  int64_t total = 0, shadow_bytes = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    const EmaTensor& t = p.tensors[i];
    require_float(t.online_dtype);
    total += t.numel;
    if (!t.shadow) continue;
    require_float(t.shadow_dtype);
    shadow_bytes += t.numel * (t.shadow_dtype == DType::f32 ? 4 : 2);
  }
  const Factors f{set1(static_cast<float>(p.momentum)), set1(static_cast<float>(1.0 - p.momentum))};
  const bool streamed = shadow_bytes > STREAM_BYTES;
  constexpr int64_t WORTH_A_THREAD = 1 << 17; // 40 us; waking a thread takes 10, and 150 on a busy machine
  const int64_t useful = total / WORTH_A_THREAD + 1;
  const int threads = useful < p.threads ? static_cast<int>(useful) : p.threads;
  parallel_for(total, threads, [&](int64_t begin, int64_t end) {
    int64_t start = 0; // of tensor i on the common axis
    for (int64_t i = 0; i < p.count && start < end; start += p.tensors[i++].numel) {
      const EmaTensor& t = p.tensors[i];
      const int64_t from = begin > start ? begin - start : 0;
      const int64_t to = end - start < t.numel ? end - start : t.numel;
      if (from < to) update(p.form, {t, from, to - from, f, streamed});
    }
    if (streamed) _mm_sfence();
  });
}

} // namespace jepa::JEPA_ISA
