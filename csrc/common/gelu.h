// The exact GELU, x Phi(x) with the normal distribution Phi, and its slope.
#pragma once
#include "common/simd.h"

namespace jepa::JEPA_ISA {

// e^(-x^2 / 2).
static inline vf bell(vf x) { return exp2v(mul(mul(x, x), set1(-0.72134752f))); }

// Phi(x), given bell(x): the tail Phi(-|x|) over it is t times a polynomial of t = 1 / (1 + 0.345 |x|), a
// minimax fit with a relative error of 2e-8. Nothing cancels for x < 0.
static inline vf normal(vf x, vf bell) {
  const vf t = div(set1(1.f), fma(vabs(x), set1(0.345f), set1(1.f)));
  vf y = set1(-0.0284272991f);
  y = fma(y, t, set1(0.145488381f));
  y = fma(y, t, set1(-0.271570683f));
  y = fma(y, t, set1(0.187618673f));
  y = fma(y, t, set1(-0.0378706902f));
  y = fma(y, t, set1(0.111904778f));
  y = fma(y, t, set1(0.117213748f));
  y = fma(y, t, set1(0.138024002f));
  y = fma(y, t, set1(0.137619123f));
  const vf tail = mul(mul(y, t), bell);
  return select(less(x, zero()), tail, sub(set1(1.f), tail));
}

static inline vf gelu(vf x) { return mul(x, normal(x, bell(x))); }

static inline vf gelu_slope(vf x) {
  const vf b = bell(x);
  return fma(mul(x, set1(0.39894228f)), b, normal(x, b));
}

} // namespace jepa::JEPA_ISA
