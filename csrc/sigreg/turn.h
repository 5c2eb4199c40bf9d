// Turns by an angle, as what they change: 1 - cos and sin. Repeated turns then round at the scale of the
// change.
#pragma once
#include "common/simd.h"

namespace jepa::JEPA_ISA {

struct Turn {
  vf versine, sine; // 1 - cos, sin
};

// Both within 1e-7 for angles up to 1e4, near 0 relatively; NaN and infinities give NaN.
static inline Turn turn_by(vf angle) {
  const vf whole = set1(0x1.8p23f); // added, leaves whole numbers in the last bits
  const vf shifted = fma(angle, set1(0x1.45f306p-1f), whole), quarters = sub(shifted, whole);
  vf r = fnma(quarters, set1(0x1.921fb6p0f), angle); // pi / 2 in three parts
  r = fnma(quarters, set1(-0x1.777a5cp-25f), r);
  r = fnma(quarters, set1(-0x1.ee59dap-50f), r);
  r = vmin(set1(1.f),
           vmax(set1(-1.f), r)); // beyond 2^22 quarters no digit is left; NaN comes second and stays
  const vf s = mul(r, r);
  vf sine = fma(s, fma(s, set1(-1.951527e-4f), set1(8.33216e-3f)), set1(-1.6666655e-1f));
  sine = fma(mul(sine, s), r, r);
  vf versine = fma(s, fma(s, set1(-2.4476185e-5f), set1(1.3887723e-3f)), set1(-4.1666653e-2f));
  versine = fma(mul(versine, s), s, mul(s, set1(0.5f)));
  const mask odd = bit(shifted, 0), opposite = bit(shifted, 1);
  const vf v = select(odd, add(set1(1.f), sine), versine), w = select(odd, sub(set1(1.f), versine), sine);
  return {select(opposite, sub(set1(2.f), v), v), select(opposite, sub(zero(), w), w)};
}

// (x, y) turned.
static inline void turn(const Turn& by, vf& x, vf& y) {
  const vf before = x;
  x = fnma(by.sine, y, fnma(by.versine, x, x));
  y = fma(by.sine, before, fnma(by.versine, y, y));
}

} // namespace jepa::JEPA_ISA
