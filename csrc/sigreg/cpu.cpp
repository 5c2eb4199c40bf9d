// Work between matrix products: directions before them, characteristic functions and their derivative after.
// A register holds a value of each of its slices; rows follow one another, so that sums have one order.
#include "sigreg/sigreg.h"

#include <cmath>

#include "common/parallel.h"
#include "common/philox.h"
#include "sigreg/turn.h"

namespace jepa::JEPA_ISA {

constexpr uint64_t SALT = uint64_t{0x53494752} << 32; // apart from the numbers that masks are drawn from
constexpr int NUMBERS = 4;                            // of one block of the generator
constexpr int LANES = 32;                             // blocks at a time, in loops that become vectors

// 2 floor(x) + 1. std::floor would keep the loop around it from becoming one of vectors.
static inline int32_t odd_floor(float x) {
  const int32_t towards_zero = static_cast<int32_t>(x);
  return 2 * towards_zero + (static_cast<float>(towards_zero) > x ? -1 : 1);
}

// Two standard normal numbers from two words, by Box and Muller's transform, on the grid of odd multiples of
// 2^-17. Every operation is rounded on its own, so that these are the same bits everywhere.
static void normals(const uint32_t* first, const uint32_t* second, int32_t* one, int32_t* other) {
  float u[LANES], m[LANES]; // numbers and their bits: only through memory do these loops become vectors
  int32_t bits[LANES], exponent[LANES];
  for (int i = 0; i < LANES; ++i) u[i] = static_cast<float>(static_cast<int32_t>((first[i] >> 8) + 1));
  std::memcpy(bits, u, sizeof u);
  for (int i = 0; i < LANES; ++i) {
    exponent[i] = (bits[i] - 0x3F3504F3) >> 23;
    bits[i] -= exponent[i] * (1 << 23);
  }
  std::memcpy(m, bits, sizeof m); // in [sqrt(1/2), sqrt(2)); u = m 2^exponent, in [1, 2^24]
  for (int i = 0; i < LANES; ++i) {
    const float t = (m[i] - 1.f) / (m[i] + 1.f), q = t * t;
    const float log_m =
        (((q * float(2. / 9) + float(2. / 7)) * q + float(2. / 5)) * q + float(2. / 3)) * q * t + 2.f * t;
    const float radius = std::sqrt(static_cast<float>(24 - exponent[i]) * 0x1.62e430p0f - 2.f * log_m);
    const float angle = (static_cast<float>(static_cast<int32_t>(second[i] >> 8)) + 0.5f) * 0x1.921fb6p-25f;
    const float s = angle * angle;
    const float sine = ((s * float(-1. / 5040) + float(1. / 120)) * s + float(-1. / 6)) * s * angle + angle;
    const float cosine =
        (((s * float(1. / 40320) + float(-1. / 720)) * s + float(1. / 24)) * s + float(-1. / 2)) * s + 1.f;
    const bool swapped = second[i] & 1;
    const float x = swapped ? sine : cosine, y = swapped ? cosine : sine; // one of eight octants
    one[i] = odd_floor((second[i] & 2 ? -x : x) * radius * 65536.f);
    other[i] = odd_floor((second[i] & 4 ? -y : y) * radius * 65536.f);
  }
}

// The numbers of slice `number` from element `first` on, LANES blocks of them.
static void draw(uint32_t first, uint32_t number, uint64_t step, uint64_t seed, int32_t* grid) {
  uint32_t word[NUMBERS][LANES];
  for (uint32_t lane = 0; lane < LANES; ++lane) {
    const Words words = philox(
        {{first / NUMBERS + lane, number, static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32)}},
        seed ^ SALT);
    for (int i = 0; i < NUMBERS; ++i) word[i][lane] = words.x[i];
  }
  int32_t drawn[NUMBERS][LANES];
  for (int i = 0; i < NUMBERS; i += 2) normals(word[i], word[i + 1], drawn[i], drawn[i + 1]);
  for (int lane = 0; lane < LANES; ++lane)
    for (int i = 0; i < NUMBERS; ++i) grid[lane * NUMBERS + i] = drawn[i][lane];
}

// On the grid the sum of squares is a whole number: exact in any order.
void sigreg_directions_cpu(const SigregDirectionsParams& p) {
  constexpr int64_t DRAWN = NUMBERS * LANES;
  parallel_for(p.slices, p.slices * p.width < 4096 ? 1 : p.threads, [&](int64_t begin, int64_t end) {
    int32_t* grid = new int32_t[(p.width + DRAWN - 1) / DRAWN * DRAWN];
    for (int64_t slice = begin; slice < end; ++slice) {
      for (int64_t e = 0; e < p.width; e += DRAWN)
        draw(static_cast<uint32_t>(e), static_cast<uint32_t>(p.first + slice), p.step, p.seed, grid + e);
      int64_t squares = 0;
      for (int64_t e = 0; e < p.width; ++e) squares += int64_t{grid[e]} * grid[e];
      const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(squares)));
      for (int64_t e = 0; e < p.width; ++e) p.out[slice * p.width + e] = static_cast<float>(grid[e]) * scale;
    }
    delete[] grid;
  });
}

static double knot(const SigregKnots& at, int64_t k) { return static_cast<double>(k) * at.delta; }
static double normal_at(double t) { return std::exp(-0.5 * t * t); } // its characteristic function

// body(view, first slice, slices of the register) for every view and register of slices.
template <class Body> static void each_register(const SigregKnots& at, int64_t rows, int threads, Body body) {
  const int64_t registers = (at.slices + W - 1) / W;
  const bool small = at.views * registers * rows < 256;
  parallel_for(at.views * registers, small ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % registers * W, rest = at.slices - first;
      body(i / registers, first, rest < W ? static_cast<int>(rest) : W);
    }
  });
}

static inline vf load_first(const float* p, int n) { return n == W ? load(p) : load(p, n); }

// sums [knots][2][W] += cosines less `normal` [knots], and sines, of ROWS rows at every knot but the first.
// Sums of differences stay small, and so do their roundings.
template <int ROWS>
static void add_rows(const float* y, int64_t row, int lanes, vf delta, const float* normal, int64_t knots,
                     float* sums) {
  Turn by[ROWS];
  vf x[ROWS], z[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    by[r] = turn_by(mul(load_first(y + r * row, lanes), delta));
    x[r] = set1(1.f);
    z[r] = zero();
  }
  for (int64_t k = 1; k < knots; ++k) {
    for (int r = 0; r < ROWS; ++r) turn(by[r], x[r], z[r]);
    vf cosine = x[0], sine = z[0];
    for (int r = 1; r < ROWS; ++r) {
      cosine = add(cosine, x[r]);
      sine = add(sine, z[r]);
    }
    float* to = sums + 2 * W * k;
    store(to, add(load(to), fnma(set1(ROWS), set1(normal[k]), cosine)));
    store(to + W, add(load(to + W), sine));
  }
}

constexpr int64_t BLOCK = 64; // rows whose sums are kept in fp32

void sigreg_moments_cpu(const SigregMomentsParams& p) {
  const int64_t knots = p.at.knots, size = 2 * W * knots;
  const vf delta = set1(static_cast<float>(p.at.delta));
  float* const normal = new float[knots];
  for (int64_t k = 0; k < knots; ++k) normal[k] = static_cast<float>(normal_at(knot(p.at, k)));
  each_register(p.at, p.rows, p.threads, [&](int64_t view, int64_t first, int lanes) {
    float* const sums = new float[size];
    double* const total = new double[size]();
    const float* const y = p.y + view * p.rows * p.at.slices + first;
    for (int64_t begin = 0; begin < p.rows; begin += BLOCK) {
      const int64_t end = begin + BLOCK < p.rows ? begin + BLOCK : p.rows;
      std::memset(sums, 0, size * sizeof(float));
      int64_t n = begin;
      for (; n + 2 <= end; n += 2)
        add_rows<2>(y + n * p.at.slices, p.at.slices, lanes, delta, normal, knots, sums);
      if (n < end) add_rows<1>(y + n * p.at.slices, p.at.slices, lanes, delta, normal, knots, sums);
      for (int64_t i = 2 * W; i < size; ++i) total[i] += sums[i];
    }
    for (int64_t k = 1; k < knots; ++k) { // what rounding the expectations took away
      const double lost = static_cast<double>(normal[k]) - normal_at(knot(p.at, k));
      for (int i = 0; i < W; ++i) total[2 * W * k + i] += static_cast<double>(p.rows) * lost;
    }
    for (int i = 0; i < W; ++i) total[i] = static_cast<double>(p.rows);
    for (int64_t part = 0; part < 2; ++part)
      for (int64_t k = 0; k < knots; ++k) {
        float* to = p.moments + ((view * 2 + part) * knots + k) * p.at.stride + first;
        for (int i = 0; i < lanes; ++i) to[i] = static_cast<float>(total[2 * W * k + part * W + i]);
      }
    delete[] total;
    delete[] sums;
  });
  delete[] normal;
}

// Of the trapezoid of an even function, folded to [0, t_max], under the normal's own characteristic function.
static double weight(const SigregKnots& at, int64_t k) {
  return (k == 0 || k == at.knots - 1 ? 1 : 2) * at.delta * normal_at(knot(at, k));
}

void sigreg_forward_cpu(const SigregForwardParams& p) {
  const int64_t knots = p.at.knots, slices = p.at.slices;
  double loss = 0.0;
  for (int64_t view = 0; view < p.at.views; ++view) {
    const float* const moments = p.moments + view * 2 * knots * slices;
    double distance = 0.0;
    for (int64_t k = 1; k < knots; ++k) {
      double sum[4] = {}; // chains that do not wait for one another
      for (int64_t part = 0; part < 2; ++part)
        for (int64_t s = 0; s < slices; ++s) {
          const double x = moments[(part * knots + k) * slices + s];
          sum[s % 4] += x * x;
        }
      distance += weight(p.at, k) * ((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    loss += moments[0] > 0 ? distance / moments[0] : moments[0]; // no rows: 0
  }
  *p.loss = static_cast<float>(p.at.views ? loss / static_cast<double>(p.at.views * slices) : 0.0);
}

// The derivative is the real part of sum_k (sine part + i cosine part)_k e^(i k delta y): Horner's rule,
// in turns. factors [knots][2][W].
template <int ROWS>
static void derive_rows(float* y, int64_t row, int lanes, vf delta, int64_t knots, const float* factors) {
  Turn by[ROWS];
  vf x[ROWS], z[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    by[r] = turn_by(mul(load_first(y + r * row, lanes), delta));
    x[r] = z[r] = zero();
  }
  for (int64_t k = knots - 1; k > 0; --k) {
    const vf real = load(factors + 2 * W * k), imaginary = load(factors + 2 * W * k + W);
    for (int r = 0; r < ROWS; ++r) {
      x[r] = add(x[r], real);
      z[r] = add(z[r], imaginary);
      turn(by[r], x[r], z[r]);
    }
  }
  for (int r = 0; r < ROWS; ++r) store_first(y + r * row, x[r], lanes);
}

void sigreg_backward_cpu(const SigregBackwardParams& p) {
  const int64_t knots = p.at.knots;
  const vf delta = set1(static_cast<float>(p.at.delta));
  double* const slope = new double[knots];
  for (int64_t k = 0; k < knots; ++k) slope[k] = 2.0 * p.scale * weight(p.at, k) * knot(p.at, k);
  each_register(p.at, p.rows, p.threads, [&](int64_t view, int64_t first, int lanes) {
    float* const factors = new float[2 * W * knots]();
    const float* const moments = p.moments + view * 2 * knots * p.at.stride + first;
    for (int64_t k = 1; k < knots; ++k)
      for (int i = 0; i < lanes; ++i) {
        const double count = moments[i];
        factors[2 * W * k + i] =
            static_cast<float>(slope[k] * moments[(knots + k) * p.at.stride + i] / count);
        factors[2 * W * k + W + i] = static_cast<float>(slope[k] * moments[k * p.at.stride + i] / count);
      }
    float* const y = p.y + view * p.rows * p.at.slices + first;
    int64_t n = 0;
    for (; n + 2 <= p.rows; n += 2)
      derive_rows<2>(y + n * p.at.slices, p.at.slices, lanes, delta, knots, factors);
    if (n < p.rows) derive_rows<1>(y + n * p.at.slices, p.at.slices, lanes, delta, knots, factors);
    delete[] factors;
  });
  delete[] slope;
}

} // namespace jepa::JEPA_ISA
