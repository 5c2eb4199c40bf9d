// The matrix product: panels of both operands, and the tile of registers that multiplies them.
//
// Each element of the result is one chain of multiply-adds in the order of k, cut into equal slices of at
// most DEPTH terms, wherever it lies in its tile: it does not depend on the rows beside it, nor on the number
// of threads.
#pragma once
#include <cstring>

#include "common/panels.h"
#include "common/simd.h"

namespace jepa::JEPA_ISA {

// A register tile of ROWS x COLUMNS sums leaves room for a row of the right panel and one broadcast.
constexpr int ROWS = W == 16 ? 12 : 6;
constexpr int COLUMNS = 2 * W;
constexpr int64_t DEPTH = 192; // a slice of a right panel stays in L1 while the tile's left panels pass

// c [ROWS, COLUMNS] = a [depth, ROWS]^T b [depth, COLUMNS], or += it. What lies `ahead` of b comes next.
template <bool add_to>
static void multiply(const float* a, const float* b, int64_t depth, int64_t ahead, float* c) {
  vf sum[ROWS][2];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = zero();
  for (int64_t k = 0; k < depth; ++k, a += ROWS, b += COLUMNS) {
    _mm_prefetch(reinterpret_cast<const char*>(b + ahead), _MM_HINT_T1);
    const vf b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const vf x = set1(a[r]);
      sum[r][0] = fma(x, b0, sum[r][0]);
      sum[r][1] = fma(x, b1, sum[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r, c += COLUMNS) {
    store(c, add_to ? add(load(c), sum[r][0]) : sum[r][0]);
    store(c + W, add_to ? add(load(c + W), sum[r][1]) : sum[r][1]);
  }
}

// c [panels * ROWS, COLUMNS] = A B for `panels` left panels and one right panel.
static void multiply_tile(const float* a, int64_t panels, const float* b, int64_t depth, float* c) {
  if (depth == 0) std::memset(c, 0, panels * ROWS * COLUMNS * sizeof(float));
  const int64_t slices = (depth + DEPTH - 1) / DEPTH, slice = slices ? (depth + slices - 1) / slices : 0;
  for (int64_t k = 0; k < depth; k += slice) {
    const auto product = k == 0 ? multiply<false> : multiply<true>;
    for (int64_t i = 0; i < panels; ++i)
      product(a + (i * depth + k) * ROWS, b + k * COLUMNS, depth - k < slice ? depth - k : slice,
              slice * COLUMNS, c + i * ROWS * COLUMNS);
  }
}

} // namespace jepa::JEPA_ISA
