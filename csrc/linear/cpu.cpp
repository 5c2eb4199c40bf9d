// The right operand is cut into panels once, the left one a tile at a time by the thread that multiplies it.
#include "linear/linear.h"

#include "common/copy.h"
#include "common/lines.h"
#include "common/multiply.h"
#include "common/parallel.h"

namespace jepa::JEPA_ISA {

using linear::CHUNK;
using linear::TILE_ROWS;
using Operand = LinearOperand;
using Params = LinearMultiplyParams;
static_assert(TILE_ROWS % ROWS == 0 && linear::MAX_COLUMNS % COLUMNS == 0);

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Lanes [first, last), LANES of them or fewer, become one panel of `depth` steps; those that lack are 0.
template <int LANES>
static void pack_panel(const Operand& from, int64_t first, int64_t last, int64_t begin, int64_t depth,
                       float* panel) {
  const float* x = from.x + first * from.lane + begin * from.step;
  const int64_t lanes = last - first;
  if (lanes == LANES && from.step == 1) return interleave<LANES>(x, from.lane, depth, panel);
  if (lanes < LANES && depth > 0) std::memset(panel, 0, depth * LANES * sizeof(float));
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t lane = 0; lane < lanes; ++lane)
      panel[k * LANES + lane] = x[lane * from.lane + k * from.step];
}

// Lanes [first, last) become panels. Those side by side in memory are read GROUP panels at a time: a panel
// alone would come back to the lines and pages of every step.
template <int LANES>
static void pack(const Operand& from, int64_t first, int64_t last, int64_t begin, int64_t depth,
                 float* panels) {
  constexpr int64_t GROUP = 8 * LANES;
  const int64_t whole = from.lane == 1 ? (last - first) / LANES * LANES : 0;
  for (int64_t group = 0; group < whole; group += GROUP) {
    const float* x = from.x + first + begin * from.step;
    for (int64_t k = 0; k < depth; ++k, x += from.step)
      for (int64_t lane = group; lane < least(group + GROUP, whole); lane += LANES)
        std::memcpy(panels + lane * depth + k * LANES, x + lane, LANES * sizeof(float));
  }
  for (int64_t lane = first + whole; lane < last; lane += LANES)
    pack_panel<LANES>(from, lane, least(lane + LANES, last), begin, depth, panels + (lane - first) * depth);
}

// Which part of the depth is added to the result, and how it is written.
struct Chunk {
  int64_t begin, depth;
  bool streamed;
};

// A row of sums to columns column, column + 1, ... of the result; later chunks of the depth add to it.
static void finish(const Params& p, int64_t row, int64_t column, const Chunk& chunk, const float* sums) {
  float* out = p.out + row * p.columns;
  for (const int64_t end = least(column + COLUMNS, p.columns); column < end; column += W, sums += W) {
    const int n = part(end - column);
    vf x = load(sums);
    if (chunk.begin > 0)
      x = add(x, load(out + column, 1, n));
    else if (p.bias)
      x = add(x, load(p.bias + column * p.bias_stride, p.bias_stride, n));
    if (chunk.streamed)
      stream(out + column, x);
    else
      store_first(out + column, x, n);
  }
}

// A chunk of rows [row, end), at most TILE_ROWS.
static void compute_rows(const Params& p, int64_t row, int64_t end, const Chunk& chunk, float* left) {
  pack<ROWS>(p.left, row, end, chunk.begin, chunk.depth, left);
  alignas(64) float sums[TILE_ROWS * COLUMNS];
  for (int64_t column = 0; column < p.columns; column += COLUMNS) {
    multiply_panels(left, panels_of(end - row, ROWS), p.panels + column * chunk.depth, chunk.depth, sums);
    for (int64_t i = row; i < end; ++i) finish(p, i, column, chunk, sums + (i - row) * COLUMNS);
  }
}

static void multiply_chunk(const Params& p, const Chunk& chunk) {
  const int64_t depth = chunk.depth;
  parallel_for(panels_of(p.columns, COLUMNS), p.threads, [&](int64_t from, int64_t to) {
    pack<COLUMNS>(p.right, from * COLUMNS, least(to * COLUMNS, p.columns), chunk.begin, depth,
                  p.panels + from * COLUMNS * depth);
  });
  parallel_for(panels_of(p.rows, ROWS), p.threads, [&](int64_t from, int64_t to) {
    float* left = p.scratch + thread_rank() * TILE_ROWS * depth;
    const int64_t last = least(to * ROWS, p.rows);
    for (int64_t row = from * ROWS; row < last; row += TILE_ROWS)
      compute_rows(p, row, least(row + TILE_ROWS, last), chunk, left);
    if (chunk.streamed) _mm_sfence();
  });
}

void linear_multiply_cpu(const Params& p) {
  const int64_t chunks = p.depth > CHUNK ? panels_of(p.depth, CHUNK) : 1;
  const bool streamed = chunks == 1 && worth_streaming(p.out, p.rows, p.columns * sizeof(float));
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t begin = p.depth * i / chunks;
    multiply_chunk(p, {begin, p.depth * (i + 1) / chunks - begin, streamed});
  }
}

constexpr int64_t BLOCK = 1024; // columns that are summed together: lines of memory in a row, sums in L1

// Columns from `column` on, n <= BLOCK of them; GROUP rows at a time, since one long chain rounds worse.
static void sum_columns(const LinearSumParams& p, int64_t column, int64_t n) {
  constexpr int64_t GROUP = 64;
  alignas(64) float sums[BLOCK], total[BLOCK] = {};
  for (int64_t begin = 0; begin < p.rows; begin += GROUP) {
    std::memset(sums, 0, sizeof sums);
    for (int64_t row = begin; row < least(begin + GROUP, p.rows); ++row)
      add_line(p.x + row * p.row_stride + column * p.column_stride, p.column_stride, n, sums);
    add_line(sums, 1, n, total);
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
