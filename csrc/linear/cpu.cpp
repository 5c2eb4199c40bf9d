// The right operand is cut into panels once, the left one a tile at a time by the thread that multiplies it.
#include "linear/linear.h"

#include "common/copy.h"
#include "common/gelu.h"
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
  bool activated, streamed; // activated: its sums are what GELU is of
};

static void write(float* p, vf x, int n, bool streamed) {
  if (streamed)
    stream(p, x);
  else
    store_first(p, x, n);
}

// A row of sums, with the bias or the earlier chunks of the depth, to columns column, column + 1, ...
static void finish(const Params& p, int64_t row, int64_t column, const Chunk& chunk, float* sums) {
  float* const out = (p.kept ? p.kept : p.out) + row * p.columns;
  for (const int64_t end = least(column + COLUMNS, p.columns); column < end; column += W, sums += W) {
    const int n = part(end - column);
    vf x = load(sums);
    if (chunk.begin > 0)
      x = add(x, load(out + column, 1, n));
    else if (p.bias)
      x = add(x, load(p.bias + column * p.bias_stride, p.bias_stride, n));
    if (chunk.activated) store(sums, x);
    if (!chunk.activated || p.kept) write(out + column, x, n, chunk.streamed);
  }
}

// What GELU makes of the row that was finished.
static void activate(const Params& p, int64_t row, int64_t column, const Chunk& chunk, const float* sums) {
  float* const out = p.out + row * p.columns;
  for (const int64_t end = least(column + COLUMNS, p.columns); column < end; column += W, sums += W)
    write(out + column, gelu(load(sums)), part(end - column), chunk.streamed);
}

// A chunk of rows [row, end), at most TILE_ROWS.
static void compute_rows(const Params& p, int64_t row, int64_t end, const Chunk& chunk, float* left) {
  const int64_t depth = chunk.depth, width = p.columns;
  pack<ROWS>(p.left, row, end, chunk.begin, depth, left);
  alignas(64) float sums[ROWS * COLUMNS];
  for (int64_t column = 0; column < width; column += COLUMNS)
    for (int64_t i = row; i < end; i += ROWS) {
      const int64_t rows = least(end - i, ROWS), columns = least(width - column, COLUMNS);
      const int64_t place = i * width + column;
      if (!chunk.streamed) fetch_block(p.out + place, rows, columns, width);
      if (!chunk.streamed && p.kept) fetch_block(p.kept + place, rows, columns, width);
      multiply_panel(left + (i - row) * depth, p.panels + column * depth, depth, sums);
      for (int64_t r = 0; r < rows; ++r) finish(p, i + r, column, chunk, sums + r * COLUMNS);
      for (int64_t r = 0; chunk.activated && r < rows; ++r)
        activate(p, i + r, column, chunk, sums + r * COLUMNS);
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
  const auto worth = [&](const float* out) {
    return worth_streaming(out, p.rows, p.columns * sizeof(float));
  };
  const bool streamed = chunks == 1 && worth(p.out) && (!p.kept || worth(p.kept));
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t begin = p.depth * i / chunks;
    multiply_chunk(p, {begin, p.depth * (i + 1) / chunks - begin, p.gelu && i + 1 == chunks, streamed});
  }
}

constexpr int64_t BLOCK = 1024; // columns that are summed together: lines of memory in a row, sums in L1

// Of columns from `column` on, n <= BLOCK, of a row.
static LinearOperand slopes_of(const LinearSumParams& p, int64_t row, int64_t column, int64_t n) {
  const LinearOperand x{p.x.x + row * p.x.lane + column * p.x.step, 0, p.x.step};
  if (!p.kept) return x;
  const float* kept = p.kept + row * p.columns + column;
  float* slopes = p.slopes + row * p.columns + column;
  for (int64_t i = 0; i < n; i += W) {
    const int count = part(n - i);
    store_first(slopes + i, mul(load(x.x + i * x.step, x.step, count), gelu_slope(load(kept + i, 1, count))),
                count);
  }
  return {slopes, 0, 1};
}

// Columns from `column` on, n <= BLOCK of them; GROUP rows at a time, since one long chain rounds worse.
static void sum_columns(const LinearSumParams& p, int64_t column, int64_t n) {
  constexpr int64_t GROUP = 64;
  alignas(64) float sums[BLOCK], total[BLOCK] = {};
  for (int64_t begin = 0; begin < p.rows; begin += GROUP) {
    std::memset(sums, 0, sizeof sums);
    for (int64_t row = begin; row < least(begin + GROUP, p.rows); ++row) {
      const LinearOperand slopes = slopes_of(p, row, column, n);
      add_line(slopes.x, slopes.step, n, sums);
    }
    add_line(sums, 1, n, total);
  }
  if (p.out) std::memcpy(p.out + column, total, n * sizeof(float));
}

void linear_sum_cpu(const LinearSumParams& p) {
  parallel_for(panels_of(p.columns, W), p.threads, [&](int64_t from, int64_t to) {
    const int64_t last = least(to * W, p.columns);
    for (int64_t column = from * W; column < last; column += BLOCK)
      sum_columns(p, column, least(last - column, BLOCK));
  });
}

} // namespace jepa::JEPA_ISA
