// The right operand is cut into panels once, the left one a tile at a time by the thread that multiplies it.
#include "linear/linear.h"

#include "common/multiply.h"
#include "common/parallel.h"

namespace jepa::JEPA_ISA {

using linear::CHUNK;
using linear::TILE_ROWS;
using Operand = LinearOperand;
using Params = LinearMultiplyParams;
static_assert(TILE_ROWS % ROWS == 0 && linear::MAX_COLUMNS % COLUMNS == 0);

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t panels_of(int64_t n, int64_t lanes) { return (n + lanes - 1) / lanes; }

// Lanes first, first + 1, ..., of `all`, and `depth` steps become one panel; those past the last lane are 0.
template <int LANES>
static void pack(const Operand& from, int64_t first, int64_t all, int64_t begin, int64_t depth,
                 float* panel) {
  const float* x = from.x + first * from.lane + begin * from.step;
  const int64_t lanes = least(all - first, LANES);
  if (lanes < LANES) std::memset(panel, 0, depth * LANES * sizeof(float));
  if (lanes == LANES && from.step == 1) return interleave<LANES>(x, from.lane, depth, panel);
  if (from.lane == 1) {
    for (int64_t k = 0; k < depth; ++k, x += from.step, panel += LANES)
      std::memcpy(panel, x, (lanes == LANES ? LANES : lanes) * sizeof(float));
    return;
  }
  for (int64_t lane = 0; lane < lanes; ++lane)
    for (int64_t k = 0; k < depth; ++k) panel[k * LANES + lane] = x[lane * from.lane + k * from.step];
}

// A row of sums to columns column, column + 1, ... of the result; later chunks of the depth add to it.
static void finish(const Params& p, int64_t row, int64_t column, bool first, const float* sums) {
  float* out = p.out + row * p.columns;
  for (const int64_t end = least(column + COLUMNS, p.columns); column < end; column += W, sums += W) {
    const int n = static_cast<int>(least(end - column, W));
    vf x = load(sums);
    if (!first)
      x = add(x, load(out + column, 1, n));
    else if (p.bias)
      x = add(x, load(p.bias + column * p.bias_stride, p.bias_stride, n));
    store_first(out + column, x, n);
  }
}

// Steps [begin, begin + depth) of rows [row, end), at most TILE_ROWS.
static void multiply_rows(const Params& p, int64_t row, int64_t end, int64_t begin, int64_t depth,
                          float* left) {
  const int64_t panels = panels_of(end - row, ROWS);
  for (int64_t i = 0; i < panels; ++i)
    pack<ROWS>(p.left, row + i * ROWS, p.rows, begin, depth, left + i * ROWS * depth);
  alignas(64) float sums[TILE_ROWS * COLUMNS];
  for (int64_t column = 0; column < p.columns; column += COLUMNS) {
    multiply_panels(left, panels, p.panels + column * depth, depth, sums);
    for (int64_t i = row; i < end; ++i) finish(p, i, column, begin == 0, sums + (i - row) * COLUMNS);
  }
}

static void multiply_chunk(const Params& p, int64_t begin, int64_t depth) {
  parallel_for(panels_of(p.columns, COLUMNS), p.threads, [&](int64_t from, int64_t to) {
    for (int64_t column = from * COLUMNS; column < to * COLUMNS; column += COLUMNS)
      pack<COLUMNS>(p.right, column, p.columns, begin, depth, p.panels + column * depth);
  });
  parallel_for(panels_of(p.rows, ROWS), p.threads, [&](int64_t from, int64_t to) {
    float* left = p.scratch + thread_rank() * TILE_ROWS * depth;
    const int64_t last = least(to * ROWS, p.rows);
    for (int64_t row = from * ROWS; row < last; row += TILE_ROWS)
      multiply_rows(p, row, least(row + TILE_ROWS, last), begin, depth, left);
  });
}

void linear_multiply_cpu(const Params& p) {
  const int64_t chunks = p.depth > CHUNK ? panels_of(p.depth, CHUNK) : 1;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t begin = p.depth * i / chunks;
    multiply_chunk(p, begin, p.depth * (i + 1) / chunks - begin);
  }
}

constexpr int64_t BLOCK = 1024; // columns that are summed together: lines of memory in a row, sums in L1

// sums += the columns of a row.
static void add_row(const float* x, int64_t step, int64_t n, float* sums) {
  for (int64_t i = 0; i < n; i += W) {
    const int part = static_cast<int>(least(n - i, W));
    store(sums + i, add(load(sums + i), load(x + i * step, step, part)));
  }
}

// Columns from `column` on, n <= BLOCK of them; GROUP rows at a time, since one long chain rounds worse.
static void sum_columns(const LinearSumParams& p, int64_t column, int64_t n) {
  constexpr int64_t GROUP = 64;
  alignas(64) float sums[BLOCK], total[BLOCK] = {};
  for (int64_t begin = 0; begin < p.rows; begin += GROUP) {
    std::memset(sums, 0, sizeof sums);
    for (int64_t row = begin; row < least(begin + GROUP, p.rows); ++row)
      add_row(p.x + row * p.row_stride + column * p.column_stride, p.column_stride, n, sums);
    add_row(sums, 1, n, total);
  }
  std::memcpy(p.out + column, total, n * sizeof(float));
}

void linear_sum_cpu(const LinearSumParams& p) {
  parallel_for(panels_of(p.columns, W), p.threads, [&](int64_t from, int64_t to) {
    const int64_t last = least(to * W, p.columns);
    for (int64_t column = from * W; column < last; column += BLOCK)
      sum_columns(p, column, least(last - column, BLOCK));
  });
}

} // namespace jepa::JEPA_ISA
