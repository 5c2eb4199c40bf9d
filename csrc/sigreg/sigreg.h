// SIGReg: random directions, and the empirical characteristic functions of what is projected on them.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"

namespace jepa {

// Unit vectors of slices first, first + 1, ...: functions of (seed, step, slice) alone.
struct SigregDirectionsParams {
  float* out; // [slices, width]
  int64_t slices, width, first;
  uint64_t seed, step;
  int threads;
};

JEPA_DECLARE_CPU(sigreg_directions_cpu, SigregDirectionsParams)

// Knots t_k = k * delta for k < knots. A tile holds some of the slices: moments point at its first one.
// moments[v][0][k][s] = sum over n of cos(t_k y) - exp(-t_k^2 / 2), moments[v][1][k][s] = sum of sin(t_k y).
// Both are 0 at k = 0: there, moments[v][0][0][s] is the number of rows.
struct SigregKnots {
  int64_t views, slices, knots, stride; // stride: of moments by knot, the number of slices in all
  double delta;
};

struct SigregMomentsParams {
  SigregKnots at;
  const float* y; // [views, rows, slices]
  float* moments;
  int64_t rows;
  int threads;
};

JEPA_DECLARE_CPU(sigreg_moments_cpu, SigregMomentsParams)

struct SigregForwardParams {
  SigregKnots at; // every slice
  const float* moments;
  float* loss; // [1]
};

JEPA_DECLARE_CPU(sigreg_forward_cpu, SigregForwardParams)

// y becomes `scale` times the derivative of the summed statistics of its slices.
struct SigregBackwardParams {
  SigregKnots at;
  const float* moments;
  float* y; // [views, rows, slices]
  int64_t rows;
  double scale;
  int threads;
};

JEPA_DECLARE_CPU(sigreg_backward_cpu, SigregBackwardParams)

} // namespace jepa
