// Right operands of matrix products, cut into panels: LANES columns side by side, a line for each step of the
// depth.
#pragma once
#include <cstring>

#include "common/transpose.h"

namespace jepa::JEPA_ISA {

// LANES rows of the operand, `width` apart, become one panel [depth, LANES].
template <int LANES> static void interleave(const float* rows, int64_t width, int64_t depth, float* panel) {
  const int64_t whole = LANES % 8 == 0 ? depth / 8 * 8 : 0;
  if (whole > 0) transpose(rows, width, LANES, whole, panel, LANES);
  for (int64_t k = whole; k < depth; ++k)
    for (int lane = 0; lane < LANES; ++lane) panel[k * LANES + lane] = rows[lane * width + k];
}

// Row k of the operand is cut: LANES of its columns to each panel, zeros behind the last one.
template <int LANES> static void cut(float* row, int64_t columns, int64_t k, int64_t depth, float* panels) {
  std::memset(row + columns, 0, LANES * sizeof(float));
  for (int64_t j = 0; j < columns; j += LANES)
    std::memcpy(panels + j * depth + k * LANES, row + j, LANES * sizeof(float));
}

} // namespace jepa::JEPA_ISA
