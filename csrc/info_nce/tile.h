// Tiles of similarities: rows of embeddings brought into the workspace, their products, and what is left out.
#pragma once
#include <cmath>

#include "common/floats.h"
#include "common/multiply.h"
#include "common/parallel.h"
#include "info_nce/info_nce.h"

namespace jepa::JEPA_ISA {

using info_nce::LINE;
using info_nce::Side;
using info_nce::TILE;

constexpr float LEAST_NORM = 1e-12f, LOG2E = 1.44269504f, LOWEST = -__builtin_inff();
static_assert(info_nce::WIDEST % COLUMNS == 0 && TILE % COLUMNS == 0);

struct Range {
  int64_t first, count;
};
static inline Range tile_at(int64_t i, int64_t count) {
  const int64_t first = i * TILE;
  return {first, count - first < TILE ? count - first : TILE};
}
static inline int64_t tiles_of(int64_t count) { return (count + TILE - 1) / TILE; }

// In double: of rows whose squares, or their sum, are beyond fp32.
template <class T> static float norm_of_huge(const T* row, int64_t stride, int64_t channels) {
  double sum = 0.0;
  for (int64_t c = 0; c < channels; c += W) {
    float lanes[W];
    store(lanes, load(row + c * stride, stride, part(channels - c)));
    for (float v : lanes) sum += static_cast<double>(v) * v;
  }
  return static_cast<float>(std::sqrt(sum));
}

// Norms of all rows, at least LEAST_NORM; 1 where embeddings are taken as they are.
static void norms(const Side& side, int64_t channels, bool normalize, int threads, float* out) {
  with_float(side.dtype, [&](auto x) {
    using T = decltype(x);
    parallel_for(side.count, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* row = static_cast<const T*>(side.rows) + i * side.row;
        vf sum = zero();
        for (int64_t c = 0; c < channels && normalize; c += W) {
          const vf v = load(row + c * side.channel, side.channel, part(channels - c));
          sum = fma(v, v, sum);
        }
        const float square = hsum(sum);
        const float norm = std::isinf(square) ? norm_of_huge(row, side.channel, channels) : std::sqrt(square);
        out[i] = !normalize ? 1.f : norm < LEAST_NORM ? LEAST_NORM : norm;
      }
    });
  });
}

// out[r] = row over (its norm * temperature), zeros up to `width`; zero rows up to a multiple of a panel's
// lanes.
static void bring(const Side& side, Range at, int64_t channels, const float* norm, double temperature,
                  int64_t width, float* out) {
  with_float(side.dtype, [&](auto x) {
    using T = decltype(x);
    for (int64_t r = 0; r < at.count; ++r, out += width) {
      const T* row = static_cast<const T*>(side.rows) + (at.first + r) * side.row;
      const vf divisor = set1(static_cast<float>(norm[at.first + r] * temperature));
      for (int64_t c = 0; c < channels; c += W) {
        const int lanes = part(channels - c);
        store(out + c, div(load(row + c * side.channel, side.channel, lanes), divisor));
      }
      for (int64_t c = (channels + W - 1) / W * W; c < width; ++c) out[c] = 0.f;
    }
    for (int64_t r = at.count; r % COLUMNS; ++r, out += width) std::memset(out, 0, width * sizeof(float));
  });
}

// Panels of rows [depth = rows, channels] for the gradients' products.
static void cut_rows(float* rows, int64_t count, int64_t channels, int64_t width, float* panels) {
  for (int64_t r = 0; r < count; ++r) cut<COLUMNS>(rows + r * width, channels, r, count, panels);
}

// A tile of S: rows of x by columns of y. Entries left out, and those behind the last column, are -inf.
struct Tile {
  Range rows, columns;
  int64_t shift;
  float* s; // [TILE, LINE]

  int64_t padded() const { return (columns.count + COLUMNS - 1) / COLUMNS * COLUMNS; }
  float* row(int64_t r) const { return s + r * LINE; }
  // The place of a row's pair in the tile; outside [0, columns.count) where it is elsewhere.
  int64_t pair_of(int64_t r) const { return rows.first + r + shift - columns.first; }
  bool holds_pair(int64_t r) const { return pair_of(r) >= 0 && pair_of(r) < columns.count; }

  void multiply(const float* x, int64_t width, const float* turned, int64_t channels) const {
    for (int64_t r = 0; r < rows.count; ++r) std::memset(row(r), 0, padded() * sizeof(float));
    multiply_tile(rows.count, columns.count, channels, x, width, turned, s, LINE);
  }
  void leave_out(const float* row_items, const float* col_items) const {
    const vf lowest = set1(LOWEST);
    for (int64_t r = 0; r < rows.count; ++r) {
      const float pair = holds_pair(r) ? row(r)[pair_of(r)] : 0.f;
      for (int64_t c = 0; row_items && c < columns.count; c += W) {
        const vf own = set1(row_items[rows.first + r]),
                 other = load(col_items + columns.first + c, part(columns.count - c));
        const vf v = load(row(r) + c);
        store(row(r) + c, select(less(own, other), v, select(less(other, own), v, lowest)));
      }
      if (holds_pair(r)) row(r)[pair_of(r)] = pair;
      for (int64_t c = columns.count; c < padded(); ++c) row(r)[c] = LOWEST;
    }
  }
};

} // namespace jepa::JEPA_ISA
