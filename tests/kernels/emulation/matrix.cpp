#include "matrix.h"

namespace jepa {

static int thread_of(int row, int column) { return row / 16 * 32 + row % 8 * 4 + column % 8 / 2; }

// Of an accumulator; of operand A in registers, whose two elements a register are the accumulator's order
// too.
static int register_of(int row, int column) { return column / 8 * 4 + row % 16 / 8 * 2 + column % 2; }

static uint16_t left(const Product& p, int row, int k) {
  if (!p.from_registers) return p.by_columns ? Operand(p.a).mn_major(k, row) : Operand(p.a).k_major(row, k);
  const int at = register_of(row, k);
  return static_cast<uint16_t>(p.weights[thread_of(row, k)][at / 2] >> (at % 2 * 16));
}

void Product::run() const {
  static float a[64][16], b[16][64], d[64][64];
  const Operand right(this->b);
  multiplied += 64 * 16 * columns;
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 64; ++row) a[row][k] = widen(left(*this, row, k));
    for (int column = 0; column < columns; ++column)
      b[k][column] =
          widen(from_registers || by_columns ? right.mn_major(k, column) : right.k_major(column, k));
  }
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < columns; ++column)
      d[row][column] = accumulate ? sums[thread_of(row, column)][register_of(row, column)] : 0;
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < columns; ++column) d[row][column] += a[row][k] * b[k][column];
    for (int column = 0; column < columns; ++column)
      sums[thread_of(row, column)][register_of(row, column)] = d[row][column];
  }
}

} // namespace jepa
