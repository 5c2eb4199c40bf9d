// Right operands of matrix products, cut into panels: LANES columns side by side, a line for each step of the
// depth.
#pragma once
#include <cstring>

#include "common/transpose.h"

namespace jepa::JEPA_ISA {

static inline int64_t panels_of(int64_t n, int64_t lanes) { return (n + lanes - 1) / lanes; }

// LANES rows of the operand, `width` apart, become one panel [depth, LANES].
template <int LANES> static void interleave(const float* rows, int64_t width, int64_t depth, float* panel) {
  constexpr int EIGHTS = LANES / 8 * 8, FOURS = LANES / 4 * 4;
  const int64_t eights = depth / 8 * 8, fours = depth / 4 * 4;
  transpose(rows, width, EIGHTS, eights, panel, LANES);
  for (int lane = EIGHTS; lane < FOURS; lane += 4)
    for (int64_t k = 0; k < fours; k += 4)
      transpose_4x4(rows + lane * width + k, width, panel + k * LANES + lane, LANES);
  for (int lane = 0; lane < LANES; ++lane)
    for (int64_t k = lane < EIGHTS ? eights : lane < FOURS ? fours : 0; k < depth; ++k)
      panel[k * LANES + lane] = rows[lane * width + k];
}

// Row k of the operand is cut: LANES of its columns to each panel, zeros behind the last one.
template <int LANES> static void cut(float* row, int64_t columns, int64_t k, int64_t depth, float* panels) {
  std::memset(row + columns, 0, LANES * sizeof(float));
  for (int64_t j = 0; j < columns; j += LANES)
    std::memcpy(panels + j * depth + k * LANES, row + j, LANES * sizeof(float));
}

} // namespace jepa::JEPA_ISA
