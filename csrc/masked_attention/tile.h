// Products of small matrices in fp32: c[i][j] = sum over k of a[i][k] * b[k][j], a tile of c in registers at
// a time. Each element is one chain of multiply-adds in the order of k: its bits do not depend on the tiling.
#pragma once
#include "common/simd.h"

namespace jepa::JEPA_ISA {

constexpr int TILE_ROWS = 6;
constexpr int TILE_VECTORS = W == 16 ? 3 : 2; // 18 of 32, or 12 of 16 registers hold sums

// The left operand: a matrix with its rows at `step`, or its transpose.
struct Rows {
  const float* data;
  int64_t step;
  Rows from(int64_t i) const { return {data + i * step, step}; }
  vf operator()(int64_t i, int64_t k) const { return set1(data[i * step + k]); }
};

struct Columns {
  const float* data;
  int64_t step;
  Columns from(int64_t i) const { return {data + i, step}; }
  vf operator()(int64_t i, int64_t k) const { return set1(data[k * step + i]); }
};

// What becomes of the sums: `start` is where an element's chain begins, `finish` takes its end.
struct Overwrite {
  float* c;
  int64_t row;
  vf start(int64_t, int64_t) const { return zero(); }
  void finish(int64_t i, int64_t j, vf sum) const { store(c + i * row + j, sum); }
};

struct Accumulate {
  float* c;
  int64_t row;
  vf start(int64_t i, int64_t j) const { return load(c + i * row + j); }
  void finish(int64_t i, int64_t j, vf sum) const { store(c + i * row + j, sum); }
};

// To memory of the caller, as T, times a factor per row; only the first `width` columns.
template <class T> struct Scaled {
  T* c;
  int64_t row, width;
  const float* factor;
  vf start(int64_t, int64_t) const { return zero(); }
  void finish(int64_t i, int64_t j, vf sum) const {
    const vf x = mul(sum, set1(factor[i]));
    if (j + W <= width)
      store(c + i * row + j, x);
    else
      store(c + i * row + j, x, static_cast<int>(width - j));
  }
};

template <int rows, int vectors, class Left, class Out>
static void tile(int64_t i, int64_t j, int64_t depth, Left a, const float* b, int64_t b_row, Out out) {
  vf sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[r][v] = out.start(i + r, j + v * W);
  a = a.from(i);
  b += j;
  for (int64_t k = 0; k < depth; ++k, b += b_row) {
    vf x[vectors];
    for (int v = 0; v < vectors; ++v) x[v] = load(b + v * W);
    for (int r = 0; r < rows; ++r) {
      const vf y = a(r, k);
      for (int v = 0; v < vectors; ++v) sum[r][v] = fma(y, x[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) out.finish(i + r, j + v * W, sum[r][v]);
}

template <int vectors, class Left, class Out>
static void tile_of(int64_t rows, int64_t i, int64_t j, int64_t depth, Left a, const float* b, int64_t b_row,
                    Out out) {
  switch (rows) {
  case 1:
    return tile<1, vectors>(i, j, depth, a, b, b_row, out);
  case 2:
    return tile<2, vectors>(i, j, depth, a, b, b_row, out);
  case 3:
    return tile<3, vectors>(i, j, depth, a, b, b_row, out);
  case 4:
    return tile<4, vectors>(i, j, depth, a, b, b_row, out);
  case 5:
    return tile<5, vectors>(i, j, depth, a, b, b_row, out);
  default:
    return tile<TILE_ROWS, vectors>(i, j, depth, a, b, b_row, out);
  }
}

// rows x columns of c; columns are rounded up to whole registers, b and c have room for that.
template <class Left, class Out>
static void multiply(int64_t rows, int64_t columns, int64_t depth, Left a, const float* b, int64_t b_row,
                     Out out) {
  for (int64_t i = 0; i < rows; i += TILE_ROWS) {
    const int64_t high = rows - i < TILE_ROWS ? rows - i : TILE_ROWS;
    for (int64_t j = 0; j < columns;) {
      const int64_t left = (columns - j + W - 1) / W;
      const int64_t vectors = left < TILE_VECTORS ? left : TILE_VECTORS;
      if (vectors == TILE_VECTORS)
        tile_of<TILE_VECTORS>(high, i, j, depth, a, b, b_row, out);
      else if (vectors == 2)
        tile_of<2>(high, i, j, depth, a, b, b_row, out);
      else
        tile_of<1>(high, i, j, depth, a, b, b_row, out);
      j += vectors * W;
    }
  }
}

} // namespace jepa::JEPA_ISA
