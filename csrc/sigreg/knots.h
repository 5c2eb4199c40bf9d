// Characteristic functions at all knots, and their derivative: of projections in a panel, whose registers
// hold a value of each of W slices, and whose rows follow one another, so that sums have one order.
#pragma once
#include <cmath>
#include <cstring>

#include "sigreg/sigreg.h"
#include "sigreg/turn.h"

namespace jepa::JEPA_ISA {

using sigreg::PANEL;
using sigreg::Shape;

// Rows at a time: chains that do not wait for one another, in registers.
constexpr int TURNS = W == 16 ? 4 : 2;

static double knot(const Shape& at, int64_t k) { return static_cast<double>(k) * at.delta; }
static double normal_at(double t) { return std::exp(-0.5 * t * t); } // its characteristic function

// Of the trapezoid of an even function, folded to [0, t_max], under the normal's own characteristic function.
static double weight(const Shape& at, int64_t k) {
  return (k == 0 || k == at.knots - 1 ? 1 : 2) * at.delta * normal_at(knot(at, k));
}

// sums [knots][2][PANEL] += cosines less `normal` [knots], and sines, of COUNT rows at every knot but the
// first. Sums of differences stay small, and so do their roundings.
template <int COUNT>
static void add_rows(const float* y, vf delta, const float* normal, int64_t knots, float* sums) {
  Turn by[COUNT];
  vf x[COUNT], z[COUNT];
  for (int r = 0; r < COUNT; ++r) {
    by[r] = turn_by(mul(load(y + r * PANEL), delta));
    x[r] = set1(1.f);
    z[r] = zero();
  }
  for (int64_t k = 1; k < knots; ++k) {
    for (int r = 0; r < COUNT; ++r) turn(by[r], x[r], z[r]);
    vf cosine = x[0], sine = z[0];
    for (int r = 1; r < COUNT; ++r) {
      cosine = add(cosine, x[r]);
      sine = add(sine, z[r]);
    }
    float* to = sums + 2 * PANEL * k;
    store(to, add(load(to), fnma(set1(COUNT), set1(normal[k]), cosine)));
    store(to + PANEL, add(load(to + PANEL), sine));
  }
}

// Sums of a panel's slices over the rows of a view.
class Sums {
public:
  explicit Sums(const Shape& at)
      : at_(at), size_(2 * PANEL * at.knots), normal_(new float[at.knots]), sums_(new float[size_]),
        total_(new double[size_]) {
    for (int64_t k = 0; k < at.knots; ++k) normal_[k] = static_cast<float>(normal_at(knot(at, k)));
  }
  Sums(const Sums&) = delete;
  Sums& operator=(const Sums&) = delete;
  ~Sums() {
    delete[] total_;
    delete[] sums_;
    delete[] normal_;
  }

  void clear() { std::memset(total_, 0, size_ * sizeof(double)); }

  // y [rows, PANEL]; rows few enough for sums in fp32.
  void add(const float* y, int64_t rows) {
    const vf delta = set1(static_cast<float>(at_.delta));
    std::memset(sums_, 0, size_ * sizeof(float));
    for (int64_t i = 0; i < PANEL; i += W) {
      int64_t n = 0;
      for (; n + TURNS <= rows; n += TURNS)
        add_rows<TURNS>(y + n * PANEL + i, delta, normal_, at_.knots, sums_ + i);
      for (; n < rows; ++n) add_rows<1>(y + n * PANEL + i, delta, normal_, at_.knots, sums_ + i);
    }
    for (int64_t i = 2 * PANEL; i < size_; ++i) total_[i] += sums_[i];
  }

  // to [2, knots, slices], of `count` slices of the panel.
  void write(float* to, int64_t count) const {
    // more: what rounding the expectations took away, or the number of rows
    for (int64_t k = 0; k < at_.knots; ++k) {
      const double lost = static_cast<double>(normal_[k]) - normal_at(knot(at_, k));
      const double more = static_cast<double>(at_.rows) * (k ? lost : 1.0);
      for (int64_t i = 0; i < count; ++i) {
        to[k * at_.slices + i] = static_cast<float>(total_[2 * PANEL * k + i] + more);
        to[(at_.knots + k) * at_.slices + i] = static_cast<float>(total_[2 * PANEL * k + PANEL + i]);
      }
    }
  }

private:
  const Shape& at_;
  int64_t size_;
  float *normal_, *sums_;
  double* total_;
};

// factors [knots][2][PANEL] of a panel's `count` slices, from moments [2, knots, slices]: 0 for the others.
static void factors_of(const Shape& at, const float* moments, int64_t count, double scale, float* factors) {
  std::memset(factors, 0, 2 * PANEL * at.knots * sizeof(float));
  for (int64_t k = 1; k < at.knots; ++k) {
    const double slope = 2.0 * scale * weight(at, k) * knot(at, k);
    for (int64_t i = 0; i < count; ++i) {
      const double rows = moments[i], sine = moments[(at.knots + k) * at.slices + i];
      factors[2 * PANEL * k + i] = static_cast<float>(slope * sine / rows);
      factors[2 * PANEL * k + PANEL + i] = static_cast<float>(slope * moments[k * at.slices + i] / rows);
    }
  }
}

// The derivative is the real part of sum_k (sine part + i cosine part)_k e^(i k delta y): Horner's rule,
// in turns. Of a register of COUNT rows of y [.., PANEL] to rows of `out`.
template <int COUNT>
static void derive_rows(const float* y, vf delta, int64_t knots, const float* factors, float* out,
                        int64_t row) {
  Turn by[COUNT];
  vf x[COUNT], z[COUNT];
  for (int r = 0; r < COUNT; ++r) {
    by[r] = turn_by(mul(load(y + r * PANEL), delta));
    x[r] = z[r] = zero();
  }
  for (int64_t k = knots - 1; k > 0; --k) {
    const vf real = load(factors + 2 * PANEL * k), imaginary = load(factors + 2 * PANEL * k + PANEL);
    for (int r = 0; r < COUNT; ++r) {
      x[r] = add(x[r], real);
      z[r] = add(z[r], imaginary);
      turn(by[r], x[r], z[r]);
    }
  }
  for (int r = 0; r < COUNT; ++r) store(out + r * row, x[r]);
}

// Of a panel: y [rows, PANEL].
static void derive(const Shape& at, const float* y, int64_t rows, const float* factors, float* out,
                   int64_t row) {
  const vf delta = set1(static_cast<float>(at.delta));
  for (int64_t i = 0; i < PANEL; i += W) {
    int64_t n = 0;
    for (; n + TURNS <= rows; n += TURNS)
      derive_rows<TURNS>(y + n * PANEL + i, delta, at.knots, factors + i, out + n * row + i, row);
    for (; n < rows; ++n)
      derive_rows<1>(y + n * PANEL + i, delta, at.knots, factors + i, out + n * row + i, row);
  }
}

} // namespace jepa::JEPA_ISA
