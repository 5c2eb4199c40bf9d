// Spread of features over rows, and how alike rows are, in one pass.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"
#include "../common/dtype.h"

namespace jepa {

struct CollapseStatsParams {
  const void* z; // [rows, width]
  int64_t rows, width;
  int64_t row, column; // strides in elements
  DType dtype;
  float* out; // [4]: mean and least standard deviation, (another's), mean cosine of pairs of rows
  int threads;
};

JEPA_DECLARE_CPU(collapse_stats_cpu, CollapseStatsParams)

} // namespace jepa
