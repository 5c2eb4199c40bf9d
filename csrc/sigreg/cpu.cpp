// Projections on a panel of directions, and at once their characteristic functions; backward, derivatives of
// a few rows' projections, and at once their product with the directions.
#include "sigreg/sigreg.h"

#include "common/floats.h"
#include "common/multiply.h"
#include "common/parallel.h"
#include "sigreg/directions.h"
#include "sigreg/knots.h"

namespace jepa::JEPA_ISA {

using sigreg::BACKWARD_ROWS;
using sigreg::FORWARD_ROWS;
using sigreg::least;
using sigreg::padded;
static_assert(FORWARD_ROWS % ROWS == 0 && BACKWARD_ROWS % ROWS == 0 && PANEL % COLUMNS == 0);

void sigreg_directions_cpu(const SigregDirectionsParams& p) {
  parallel_for(p.slices, p.slices * p.width < 4096 ? 1 : p.threads, [&](int64_t begin, int64_t end) {
    const Directions draw(p.width, p.step, p.seed);
    for (int64_t slice = begin; slice < end; ++slice) draw(slice, p.out + slice * p.width);
  });
}

// Directions of a panel, zeros behind the last: turned for projections, and in panels of features where
// forward keeps them.
static void bring_directions(const SigregMomentsParams& p, const Directions& draw, int64_t first, float* rows,
                             float* turned) {
  const int64_t width = p.at.width, row = sigreg::row_of(width);
  std::memset(rows, 0, PANEL * row * sizeof(float));
  for (int64_t i = 0; i < PANEL && first + i < p.at.slices; ++i) draw(first + i, rows + i * row);
  interleave<PANEL>(rows, row, width, turned);
  for (int64_t e = 0; p.kept && e < width; e += PANEL)
    for (int64_t i = 0; i < PANEL; ++i)
      std::memcpy(p.kept + e * padded(p.at.slices) + (first + i) * PANEL, rows + i * row + e,
                  PANEL * sizeof(float));
}

void sigreg_moments_cpu(const SigregMomentsParams& p) {
  const Shape& at = p.at;
  const int64_t width = at.width, each = sigreg::forward_each(at);
  parallel_for(padded(at.slices) / PANEL, at.threads, [&](int64_t begin, int64_t end) {
    const Directions draw(width, p.step, p.seed);
    Sums sums(at);
    float* const rows = p.scratch + thread_rank() * each;
    float* const turned = rows + PANEL * sigreg::row_of(width);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * PANEL;
      bring_directions(p, draw, first, rows, turned);
      for (int64_t view = 0; view < at.views; ++view) {
        sums.clear();
        for (int64_t n = 0; n < at.rows; n += FORWARD_ROWS) {
          const int64_t count = least(FORWARD_ROWS, at.rows - n), place = view * at.rows + n;
          float* const y = p.kept ? p.kept + at.kept_directions() + first * at.total() + place * PANEL
                                  : turned + PANEL * padded(width);
          std::memset(y, 0, count * PANEL * sizeof(float));
          multiply_tile<PANEL>(count, PANEL, width, p.z + place * width, width, turned, y, PANEL);
          sums.add(y, count);
        }
        sums.write(p.moments + view * 2 * at.knots * at.slices + first, least(PANEL, at.slices - first));
      }
    }
  });
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

// out [count, padded slices], of rows that may lie in several views.
static void derivatives(const SigregBackwardParams& p, int64_t first, int64_t count, float* out) {
  const Shape& at = p.at;
  const float* const y = p.kept + at.kept_directions();
  for (int64_t slice = 0; slice < padded(at.slices); slice += PANEL)
    for (int64_t n = first; n < first + count;) {
      const int64_t view = n / at.rows, run = least(first + count, (view + 1) * at.rows) - n;
      const float* const factors = p.scratch + view * sigreg::factors_size(at) + slice * 2 * at.knots;
      derive(at, y + slice * at.total() + n * PANEL, run, factors,
             out + (n - first) * sigreg::row_of(at.slices) + slice, sigreg::row_of(at.slices));
      n += run;
    }
}

template <class T> static void put_rows(const float* in, int64_t rows, int64_t width, T* out) {
  for (int64_t r = 0; r < rows; ++r, in += padded(width), out += width)
    for (int64_t e = 0; e < width; e += W) store_first(out + e, load(in + e), part(width - e));
}

template <class T> static void backward(const SigregBackwardParams& p) {
  const Shape& at = p.at;
  const int64_t panels = padded(at.slices) / PANEL, wide = padded(at.width), row = sigreg::row_of(at.slices),
                rows = sigreg::backward_rows(at);
  parallel_for(at.views * panels, at.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t view = i / panels, first = i % panels * PANEL;
      factors_of(at, p.moments + view * 2 * at.knots * at.slices + first, least(PANEL, at.slices - first),
                 p.scale, p.scratch + view * sigreg::factors_size(at) + first * 2 * at.knots);
    }
  });
  float* const threads = p.scratch + at.views * sigreg::factors_size(at);
  parallel_for(at.total(), at.threads, [&](int64_t begin, int64_t end) {
    float* const dy = threads + thread_rank() * sigreg::backward_each(at);
    float* const dz = dy + rows * row;
    for (int64_t n = begin; n < end; n += rows) {
      const int64_t count = least(rows, end - n);
      derivatives(p, n, count, dy);
      std::memset(dz, 0, count * wide * sizeof(float));
      multiply_tile<PANEL>(count, wide, padded(at.slices), dy, row, p.kept, dz, wide);
      put_rows(dz, count, at.width, static_cast<T*>(p.dz) + n * at.width);
    }
  });
}

void sigreg_backward_cpu(const SigregBackwardParams& p) {
  with_float(p.dtype, [&](auto x) { backward<decltype(x)>(p); });
}

} // namespace jepa::JEPA_ISA
