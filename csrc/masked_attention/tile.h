// Products of small matrices, summed in fp32, a tile of the result in registers at a time. Each element is
// one chain of multiply-adds in the order of k: its bits do not depend on the tiling.
#pragma once
#include "common/simd.h"

namespace jepa::JEPA_ISA {

// Rows of a tile by its vectors: as many sums as registers allow beside one row of b and one element of a.
constexpr int MOST_VECTORS = W == 16 ? 4 : 3;
constexpr int most_rows(int vectors) {
  return W == 16 ? (vectors == 4 ? 6 : vectors == 3 ? 8 : 12) : (vectors == 3 ? 4 : vectors == 2 ? 6 : 8);
}

// c[i][j] = factor * ((accumulate ? c[i][j] : 0) + sum over k of a[i * a_row + k * a_step] * b[k * b_row +
// j]). A format F says what the product of two places is: of two floats, or of two pairs.
struct Product {
  int64_t depth; // in places
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  bool accumulate;
  float factor = 1;
};

template <class F, int rows, int vectors> static void tile(int64_t i, int64_t j, const Product& p) {
  vf sum[rows][vectors];
  float* c = p.c + i * p.c_row + j;
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[r][v] = p.accumulate ? load(c + r * p.c_row + v * W) : zero();
  const float *a = p.a + i * p.a_row, *b = p.b + j;
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_step, b += p.b_row) {
    vf x[vectors];
    for (int v = 0; v < vectors; ++v) x[v] = load(b + v * W);
    for (int r = 0; r < rows; ++r) {
      const vf y = set1(a[r * p.a_row]);
      for (int v = 0; v < vectors; ++v) sum[r][v] = F::dot(y, x[v], sum[r][v]);
    }
  }
  const vf factor = set1(p.factor);
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(c + r * p.c_row + v * W, mul(factor, sum[r][v]));
}

template <class F, int most, int vectors>
static void tile_of(int64_t rows, int64_t i, int64_t j, const Product& p) {
  if constexpr (most > 1)
    if (rows < most) return tile_of<F, most - 1, vectors>(rows, i, j, p);
  tile<F, most, vectors>(i, j, p);
}

// Rows [i, end) of `vectors` registers; what is left for two tiles is shared out evenly.
template <class F, int vectors> static void panel(int64_t i, int64_t end, int64_t j, const Product& p) {
  constexpr int most = most_rows(vectors);
  while (i < end) {
    const int64_t left = end - i, rows = left <= most ? left : left < 2 * most ? (left + 1) / 2 : most;
    tile_of<F, most, vectors>(rows, i, j, p);
    i += rows;
  }
}

static int vectors_of(int64_t left) {
  if (left <= MOST_VECTORS) return static_cast<int>(left);
  return left == MOST_VECTORS + 1 ? (MOST_VECTORS + 1) / 2 : W == 16 ? 4 : left % 2 ? 3 : 2;
}

constexpr int64_t ROWS = 48; // of a, kept in the first-level cache while all panels of b pass by
constexpr int64_t DEPTH = W == 16 ? 64 : 128; // rows of a panel of b, kept there while all these rows pass by

// rows x columns of c; columns are rounded up to whole registers, b and c have room for that.
template <class F> static void multiply(int64_t rows, int64_t columns, Product p) {
  const int64_t depth = p.depth;
  const float factor = p.factor;
  for (int64_t k = 0; k < depth; k += DEPTH) {
    p.depth = depth - k < DEPTH ? depth - k : DEPTH;
    p.factor = k + DEPTH < depth ? 1 : factor;
    for (int64_t i = 0; i < rows; i += ROWS) {
      const int64_t end = rows - i < ROWS ? rows : i + ROWS;
      for (int64_t j = 0; j < columns;) {
        const int vectors = vectors_of((columns - j + W - 1) / W);
        if (vectors == MOST_VECTORS)
          panel<F, MOST_VECTORS>(i, end, j, p);
        else if (vectors == 3)
          panel<F, 3>(i, end, j, p);
        else if (vectors == 2)
          panel<F, 2>(i, end, j, p);
        else
          panel<F, 1>(i, end, j, p);
        j += vectors * W;
      }
    }
    p.a += DEPTH * p.a_step;
    p.b += DEPTH * p.b_row;
    p.accumulate = true;
  }
}

} // namespace jepa::JEPA_ISA
