// Matrix products of tiles that lie in the workspace: the right operand in panels of PANEL columns, a
// multiple of COLUMNS; left rows as they are, or in panels of ROWS, where they would fall on one another in
// the cache.
//
// Each element of the result is one chain of multiply-adds in the order of k, cut into equal slices of at
// most DEPTH terms (CHAIN between panels): it does not depend on the rows beside it, nor on the number of
// threads.
#pragma once
#include <cstring>

#include "common/panels.h"
#include "common/simd.h"

namespace jepa::JEPA_ISA {

// A register tile of ROWS x COLUMNS sums leaves room for a row of the right panel and one broadcast.
constexpr int ROWS = W == 16 ? 12 : 6;
constexpr int COLUMNS = 2 * W;
constexpr int64_t DEPTH = 320; // a slice of a right panel stays in L1 while the left rows pass

// c [rows, COLUMNS] += a b, or = a b; b [depth, COLUMNS]; a's rows lie a_row apart, its steps of the depth
// STEP. What lies `ahead` of b comes next.
template <int rows, int PANEL, int STEP = 1, bool add_to = true>
static void multiply(const float* a, int64_t a_row, const float* b, int64_t depth, int64_t ahead, float* c,
                     int64_t c_row) {
  vf sum[rows][2];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = zero();
  for (int64_t k = 0; k < depth; ++k, a += STEP, b += PANEL) {
    _mm_prefetch(reinterpret_cast<const char*>(b + ahead), _MM_HINT_T1);
    const vf b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const vf x = set1(a[r * a_row]);
      sum[r][0] = fma(x, b0, sum[r][0]);
      sum[r][1] = fma(x, b1, sum[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r, c += c_row) {
    store(c, add_to ? add(load(c), sum[r][0]) : sum[r][0]);
    store(c + W, add_to ? add(load(c + W), sum[r][1]) : sum[r][1]);
  }
}

// Terms of each slice of a chain, all but the last of which are as long.
static inline int64_t slice_of(int64_t depth, int64_t most) {
  const int64_t slices = panels_of(depth, most);
  return slices ? panels_of(depth, slices) : 1;
}

template <int most, int PANEL>
static void multiply_rows(int64_t rows, const float* a, int64_t a_row, const float* b, int64_t depth,
                          int64_t ahead, float* c, int64_t c_row) {
  if constexpr (most > 1)
    if (rows < most) return multiply_rows<most - 1, PANEL>(rows, a, a_row, b, depth, ahead, c, c_row);
  multiply<most, PANEL>(a, a_row, b, depth, ahead, c, c_row);
}

// c [rows, columns] += A B; columns are rounded up to a multiple of COLUMNS, in b to whole panels.
template <int PANEL = COLUMNS>
static void multiply_tile(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row,
                          const float* b, float* c, int64_t c_row) {
  static_assert(PANEL % COLUMNS == 0);
  const int64_t slice = slice_of(depth, DEPTH);
  for (int64_t k = 0; k < depth; k += slice)
    for (int64_t j = 0; j < columns; j += COLUMNS) {
      const float* const right = b + j / PANEL * PANEL * depth + k * PANEL + j % PANEL;
      for (int64_t i = 0; i < rows; i += ROWS)
        multiply_rows<ROWS, PANEL>(rows - i < ROWS ? rows - i : ROWS, a + i * a_row + k, a_row, right,
                                   depth - k < slice ? depth - k : slice, slice * PANEL, c + i * c_row + j,
                                   c_row);
    }
}

// Gradients of weights sum thousands of terms: in longer chains they round worse than MKL's.
constexpr int64_t CHAIN = 192;

// A block of a result comes while it is multiplied: its lines must be there to be written. `columns` of them,
// COLUMNS at most.
template <class T> static inline void fetch_block(const T* out, int64_t rows, int64_t columns, int64_t row) {
  for (int64_t i = 0; i < rows; ++i, out += row)
    for (int64_t j = 0; j < columns; j += 64 / sizeof(T)) __builtin_prefetch(out + j, 1);
}

// c [ROWS, COLUMNS] = A B for a left and a right panel. The next right panel is fetched beside.
static inline void multiply_panel(const float* a, const float* b, int64_t depth, float* c) {
  if (depth == 0) std::memset(c, 0, ROWS * COLUMNS * sizeof(float));
  const int64_t slice = slice_of(depth, CHAIN);
  for (int64_t k = 0; k < depth; k += slice) {
    const auto product = k ? multiply<ROWS, COLUMNS, ROWS, true> : multiply<ROWS, COLUMNS, ROWS, false>;
    product(a + k * ROWS, 1, b + k * COLUMNS, depth - k < slice ? depth - k : slice, depth * COLUMNS, c,
            COLUMNS);
  }
}

} // namespace jepa::JEPA_ISA
