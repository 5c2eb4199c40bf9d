// One pass: a row's norm is found while it is on its way in, and its elements are summed while they lie in
// L1. Rows are cut into chunks whose number does not depend on the threads; sums leave fp32 every few rows.
#include "collapse_stats/collapse_stats.h"

#include <cmath>

#include "common/floats.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace jepa::JEPA_ISA {

constexpr int64_t CHUNKS = 64, LEAST = 32; // and the rows of one
constexpr int64_t FLUSH = 8;               // rows that are summed in fp32
enum Sum { DEVIATION, SQUARE, UNIT, SUMS };

static inline int rest_of(int64_t width, int64_t e) {
  return width - e < W ? static_cast<int>(width - e) : W;
}

// Deviations are taken from the mean of some rows: exact for equal rows, and no cancellation for others.
template <class T> static void find_shift(const CollapseStatsParams& p, float* shift) {
  const int64_t some = p.rows < LEAST ? p.rows : LEAST;
  const T* z = static_cast<const T*>(p.z);
  for (int64_t e = 0; e < p.width; e += W) {
    const int lanes = rest_of(p.width, e);
    const vf first = load(z + e * p.column, p.column, lanes);
    vf sum = zero();
    for (int64_t i = 0; i < some; ++i)
      sum = add(sum, sub(load(z + i * p.rows / some * p.row + e * p.column, p.column, lanes), first));
    store(shift + e, add(first, mul(sum, set1(1.f / static_cast<float>(some)))));
  }
}

// Sum of squares, in double once a lane is done: what a row is like itself must leave the mean cosine again.
template <class T> static double square_of(const CollapseStatsParams& p, const T* row) {
  vf sum[2] = {zero(), zero()};
  for (int64_t e = 0, i = 0; e < p.width; e += W, ++i) {
    const vf x = load(row + e * p.column, p.column, rest_of(p.width, e));
    sum[i % 2] = fma(x, x, sum[i % 2]);
  }
  float lanes[2 * W];
  store(lanes, sum[0]);
  store(lanes + W, sum[1]);
  double square = 0.0;
  for (float lane : lanes) square += lane;
  return square;
}

// sums [SUMS][padded] += this row's.
template <class T>
static void add_row(const CollapseStatsParams& p, const T* row, const float* shift, float inverse,
                    float* sums, int64_t padded) {
  for (int64_t e = 0; e < p.width; e += W) {
    const vf x = load(row + e * p.column, p.column, rest_of(p.width, e)), d = sub(x, load(shift + e));
    float* const to = sums + e;
    store(to + DEVIATION * padded, add(load(to + DEVIATION * padded), d));
    store(to + SQUARE * padded, fma(d, d, load(to + SQUARE * padded)));
    store(to + UNIT * padded, fma(x, set1(inverse), load(to + UNIT * padded)));
  }
}

struct Total {
  double* sums; // [SUMS][padded]
  int64_t padded;
  double own; // squares of unit rows, as rounded
};

template <class T>
static void sum_rows(const CollapseStatsParams& p, const float* shift, int64_t begin, int64_t end,
                     Total& total) {
  const int64_t size = SUMS * total.padded;
  float* const sums = new float[size];
  for (int64_t n = begin; n < end; n += FLUSH) {
    std::memset(sums, 0, size * sizeof(float));
    for (int64_t i = n; i < n + FLUSH && i < end; ++i) {
      const T* row = static_cast<const T*>(p.z) + i * p.row;
      const double square = square_of(p, row);
      const float inverse = square == 0.0 ? 0.f : static_cast<float>(1.0 / std::sqrt(square));
      total.own += square * inverse * inverse;
      add_row(p, row, shift, inverse, sums, total.padded);
    }
    for (int64_t i = 0; i < size; ++i) total.sums[i] += sums[i];
  }
  delete[] sums;
}

static void finish(const CollapseStatsParams& p, const Total& total) {
  const double rows = static_cast<double>(p.rows), pairs = rows * (rows - 1.0);
  double spread = 0.0, least = INFINITY, length = 0.0;
  for (int64_t e = 0; e < p.width; ++e) {
    const double mean = total.sums[e] / rows,
                 square = total.sums[SQUARE * total.padded + e] / rows - mean * mean;
    const double deviation = std::sqrt(square < 0.0 ? 0.0 : square),
                 unit = total.sums[UNIT * total.padded + e];
    spread += deviation;
    if (!(deviation >= least)) least = deviation; // NaN stays
    length += unit * unit;
  }
  p.out[0] = static_cast<float>(spread / static_cast<double>(p.width));
  p.out[1] = static_cast<float>(std::isnan(spread) ? spread : least);
  p.out[3] = static_cast<float>(pairs > 0.0 ? (length - total.own) / pairs : length * 0.0);
}

template <class T> static void collapse_stats(const CollapseStatsParams& p) {
  const int64_t padded = (p.width + W - 1) / W * W, size = SUMS * padded;
  const int64_t even = (p.rows + CHUNKS - 1) / CHUNKS, length = even < LEAST ? LEAST : even;
  const int64_t chunks = (p.rows + length - 1) / length;
  float* const shift = new float[padded];
  double* const sums = new double[chunks * size]();
  Total* const totals = new Total[chunks];
  find_shift<T>(p, shift);
  parallel_for(chunks, p.rows * p.width < 32768 ? 1 : p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      totals[c] = {sums + c * size, padded, 0.0};
      const int64_t last = (c + 1) * length;
      sum_rows<T>(p, shift, c * length, last < p.rows ? last : p.rows, totals[c]);
    }
  });
  for (int64_t c = 1; c < chunks; ++c) {
    for (int64_t i = 0; i < size; ++i) sums[i] += totals[c].sums[i];
    totals[0].own += totals[c].own;
  }
  finish(p, totals[0]);
  delete[] totals;
  delete[] sums;
  delete[] shift;
}

void collapse_stats_cpu(const CollapseStatsParams& p) {
  for (int i = 0; i < 4; ++i) p.out[i] = 0.f;
  if (p.rows > 0 && p.width > 0) with_float(p.dtype, [&](auto x) { collapse_stats<decltype(x)>(p); });
}

} // namespace jepa::JEPA_ISA
