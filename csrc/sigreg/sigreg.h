// SIGReg: random directions, and the empirical characteristic functions of what is projected on them.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"
#include "../common/dtype.h"

namespace jepa {

// Unit vectors of slices 0, 1, ...: functions of (seed, step, slice) alone.
struct SigregDirectionsParams {
  float* out; // [slices, width]
  int64_t slices, width;
  uint64_t seed, step;
  int threads;
};

JEPA_DECLARE_CPU(sigreg_directions_cpu, SigregDirectionsParams)

namespace sigreg {

// Columns of a panel of a matrix product, on any processor: what forward keeps, backward reads.
constexpr int64_t PANEL = 32;
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t padded(int64_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

// Embeddings [views, rows, width], and knots t_k = k * delta for k < knots.
struct Shape {
  int64_t views, rows, width, slices, knots;
  double delta;
  int threads;

  int64_t total() const { return views * rows; }
  // What forward keeps, in floats: directions, in panels of features, and projections, in panels of slices.
  int64_t kept_directions() const { return padded(slices) * padded(width); }
  int64_t kept() const { return kept_directions() + padded(slices) * total(); }
};

// Floats from row to row in memory of the kernels' own: no power of 2, which few lines of a cache would
// share.
static inline int64_t row_of(int64_t count) { return padded(count) + PANEL / 2; }
constexpr int64_t FORWARD_ROWS = 60, BACKWARD_ROWS = 48; // at a time, multiples of a tile's rows

// Floats of each thread that has a panel: its directions, as rows and turned, and projections.
static inline int64_t forward_each(const Shape& at) {
  return PANEL * (row_of(at.width) + padded(at.width) + FORWARD_ROWS);
}
static inline int64_t forward_scratch(const Shape& at) {
  return least(at.threads, padded(at.slices) / PANEL) * forward_each(at);
}
// Floats: factors of each view, and of each thread that has rows derivatives and the gradient of a block of
// them.
static inline int64_t factors_size(const Shape& at) { return 2 * at.knots * padded(at.slices); }
static inline int64_t backward_rows(const Shape& at) {
  return least(BACKWARD_ROWS, (at.total() + at.threads - 1) / at.threads);
}
static inline int64_t backward_each(const Shape& at) {
  return backward_rows(at) * (row_of(at.slices) + padded(at.width));
}
static inline int64_t backward_scratch(const Shape& at) {
  return at.views * factors_size(at) + least(at.threads, at.total()) * backward_each(at);
}

} // namespace sigreg

// moments[v][0][k][s] = sum over n of cos(t_k y) - exp(-t_k^2 / 2), moments[v][1][k][s] = sum of sin(t_k y),
// of projections y. Both are 0 at k = 0: there, moments[v][0][0][s] is the number of rows.
struct SigregMomentsParams {
  sigreg::Shape at;
  const float* z; // [views, rows, width]
  uint64_t seed, step;
  float* moments; // [views, 2, knots, slices]
  float* kept;    // null: nothing is
  float* scratch; // [forward_scratch]
};

JEPA_DECLARE_CPU(sigreg_moments_cpu, SigregMomentsParams)

struct SigregForwardParams {
  sigreg::Shape at; // of which rows and width are not looked at
  const float* moments;
  float* loss; // [1]
};

JEPA_DECLARE_CPU(sigreg_forward_cpu, SigregForwardParams)

// dz: `scale` times the gradient of the summed statistics.
struct SigregBackwardParams {
  sigreg::Shape at;
  const float *moments, *kept;
  double scale;
  void* dz; // [views, rows, width]
  DType dtype;
  float* scratch; // [backward_scratch]: [views, factors_size], then each thread's
};

JEPA_DECLARE_CPU(sigreg_backward_cpu, SigregBackwardParams)

} // namespace jepa
