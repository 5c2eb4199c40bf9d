// One row of a target, or one level of it: its norms, its distance to a prediction, and the gradient.
#pragma once
#include <cmath>

#include "common/simd.h"
#include "latent_loss/latent_loss.h"

namespace jepa::JEPA_ISA {

struct Norm {
  float mean, rstd;
};

// The same part of the two rows that follow this one. Gathered rows are short, and the hardware's own
// prefetch stops at each one's end. The second is asked for into L2, which has more lines under way than L1
// can have; the next one, there by now, into L1. Every pass asks for its share, so that memory is never idle
// and never has more to do at once than it takes.
template <class T> struct Ahead {
  const T *next, *second;

  // `registers` registers of elements from element i on.
  template <int registers> void prefetch(int64_t i) const {
    constexpr int LINE = 64;
    for (int byte = 0; byte < registers * W * int(sizeof(T)); byte += LINE) {
      _mm_prefetch(reinterpret_cast<const char*>(second + i) + byte, _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(next + i) + byte, _MM_HINT_T0);
    }
  }
};

// Two passes over a row that the first brought into L1: no cancellation.
template <class T> static Norm norm_of(const T* row, Ahead<T> ahead, int64_t n, float eps) {
  vf sum[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    ahead.template prefetch<2>(i / 2);
    for (int u = 0; u < 4; ++u) sum[u] = add(sum[u], load(row + i + u * W));
  }
  for (; i < n; i += W)
    sum[0] = add(sum[0], n - i < W ? load(row + i, static_cast<int>(n - i)) : load(row + i));
  const float mean = hsum(add(add(sum[0], sum[1]), add(sum[2], sum[3]))) / static_cast<float>(n);

  const vf m = set1(mean);
  vf square[4] = {zero(), zero(), zero(), zero()};
  for (i = 0; i + 4 * W <= n; i += 4 * W) {
    ahead.template prefetch<2>((n + i) / 2);
    for (int u = 0; u < 4; ++u) {
      const vf d = sub(load(row + i + u * W), m);
      square[u] = fma(d, d, square[u]);
    }
  }
  for (; i < n; i += W) {
    const int rest = n - i < W ? static_cast<int>(n - i) : W;
    const vf d = select(first(rest), sub(load(row + i, rest), m), zero());
    square[0] = fma(d, d, square[0]);
  }
  const float total = hsum(add(add(square[0], square[1]), add(square[2], square[3])));
  return {mean, 1.f / std::sqrt(total / static_cast<float>(n) + eps)};
}

// gain * (y - mean) / deviation + shift, in fp32.
template <class T>
static void affine_norm(const T* row, Ahead<T> ahead, int64_t n, float eps, const float* gain,
                        const float* shift, float* out) {
  const Norm norm = norm_of(row, ahead, n, eps);
  const vf mean = set1(norm.mean), rstd = set1(norm.rstd);
  for (int64_t i = 0; i < n; i += W) {
    const int rest = n - i < W ? static_cast<int>(n - i) : W;
    const vf y = mul(sub(load(row + i, 1, rest), mean), rstd);
    store_first(out + i, fma(y, load(gain + i, 1, rest), load(shift + i, 1, rest)), rest);
  }
}

static inline vf to_power(vf x, vf exponent) {
  alignas(64) float values[W], exponents[W];
  store(values, x);
  store(exponents, exponent);
  for (int i = 0; i < W; ++i) values[i] = __builtin_powf(values[i], exponents[0]);
  return load(values);
}

// Of one register of differences d; slope is 1 / beta, or power - 1. min and max hand on their second operand
// if it is NaN.
template <LossKind kind> static inline vf derivative(vf d, vf slope) {
  if constexpr (kind == LossKind::l2) return add(d, d);
  if constexpr (kind == LossKind::smooth_l1) return vmin(set1(1.f), vmax(set1(-1.f), mul(d, slope)));
  if constexpr (kind == LossKind::power) {
    const vf size = to_power(vabs(d), slope);
    return select(less(d, zero()), sub(zero(), size), size);
  }
  return select(less(zero(), d), set1(1.f), select(less(d, zero()), set1(-1.f), d)); // 0 and NaN stay
}
// sum + distance, with s the derivative; bend is -beta / 2, or 1 / power. smooth_l1 on both sides of beta:
// s (d - beta s / 2).
template <LossKind kind> static inline vf add_distance(vf sum, vf d, vf s, vf bend) {
  if constexpr (kind == LossKind::l1) return add(sum, vabs(d));
  if constexpr (kind == LossKind::l2) return fma(d, d, sum);
  if constexpr (kind == LossKind::power) return fma(mul(d, bend), s, sum);
  return fma(s, fma(bend, s, d), sum);
}

template <class T> struct UnitOf {
  using type = T;
};
template <> struct UnitOf<f16> { // 1 / count underflows in fp16
  using type = float;
};

template <LossKind kind> struct Comparison {
  vf slope, bend;
  bool normalize, streamed;
  float eps;

  Comparison(const LatentLossForwardParams& p, bool stream_unit)
      : slope(set1(kind == LossKind::power ? static_cast<float>(p.power - 1.0) : 1.f / p.beta)),
        bend(set1(kind == LossKind::power ? static_cast<float>(1.0 / p.power) : -0.5f * p.beta)),
        normalize(p.normalize), streamed(stream_unit), eps(p.eps) {}

  // The summed distance of n channels; unit (or null) gets weight * derivative.
  template <class P, class T>
  double operator()(const P* pred, const T* target, Ahead<P> preds, Ahead<T> targets,
                    typename UnitOf<P>::type* unit, int64_t n, float weight) const {
    const Norm norm = normalize ? norm_of(target, targets, n, eps) : Norm{0.f, 1.f};
    const vf mean = set1(norm.mean), rstd = set1(norm.rstd), w = set1(weight);
    const vf slope = this->slope, bend = this->bend; // in registers: a store to unit might change a member
    vf sum[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
      preds.template prefetch<4>(i);
      for (int u = 0; u < 4; ++u) {
        const int64_t at = i + u * W;
        const vf d = fma(sub(mean, load(target + at)), rstd, load(pred + at));
        const vf s = derivative<kind>(d, slope);
        sum[u] = add_distance<kind>(sum[u], d, s, bend);
        if (!unit) continue;
        if (streamed)
          stream(unit + at, mul(w, s));
        else
          store(unit + at, mul(w, s));
      }
    }
    for (; i < n; i += W) {
      const int rest = n - i < W ? static_cast<int>(n - i) : W;
      const vf d = fma(sub(mean, load(target + i, rest)), rstd, load(pred + i, rest));
      const vf s = derivative<kind>(d, slope);
      sum[0] = select(first(rest), add_distance<kind>(sum[0], d, s, bend), sum[0]);
      if (unit) store(unit + i, mul(w, s), rest);
    }
    return hsum(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
  }
};

} // namespace jepa::JEPA_ISA
