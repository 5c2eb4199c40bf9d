// What the operands of a product look like: fp32 as it is, or pairs of bf16 where the processor multiplies
// those.
#pragma once
#include "masked_attention/rows.h"
#include "masked_attention/visible.h"

namespace jepa::JEPA_ISA {

// A left operand holds the depth of the product along its rows, or (weights, when it is transposed) down its
// columns; a right operand down its columns. Both are made in place of fp32 rows, `row` apart.
struct Single {
  static constexpr int64_t PAIR = 1; // neighbours along the depth in one place
  static vf dot(vf a, vf b, vf sum) { return fma(a, b, sum); }
  static int64_t left_row(int64_t width) { return scratch_row(width); }

  static const float* to_left(const float* x, int64_t, int64_t, int64_t, float*, int64_t) { return x; }
  static void to_right(float*, int64_t, int64_t, int64_t) {}
  // Rows of a block of queries, a query in each lane.
  static void to_lanes(const float* rows, int64_t filled, int64_t width, float* lanes) {
    transpose(rows, scratch_row(width), filled, width, lanes, BLOCK);
  }
};

// Places that a depth of n takes.
template <class F> static int64_t pairs_of(int64_t n) { return (n + F::PAIR - 1) / F::PAIR; }

template <class T> struct FormatOf {
  using type = Single;
};

#if defined(__AVX512BF16__)

struct Paired {
  static constexpr int64_t PAIR = 2;
  static vf dot(vf a, vf b, vf sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static int64_t left_row(int64_t width) { return scratch_row(width / 2); }

  static const float* to_left(const float* x, int64_t row, int64_t rows, int64_t width, float* out,
                              int64_t out_row) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < width; c += W)
        store(reinterpret_cast<bf16*>(out + i * out_row) + c, load(x + i * row + c));
    return out;
  }

  // Rows 2 i and 2 i + 1 become row i of pairs.
  static void to_right(float* x, int64_t row, int64_t rows, int64_t width) {
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t c = 0; c < width; c += W) {
        const float* first = x + i * row + c;
        store(x + i / 2 * row + c, pair(load(first), i + 1 < rows ? load(first + row) : zero()));
      }
  }

  static void to_lanes(const float* rows, int64_t filled, int64_t width, float* lanes) {
    alignas(64) float pairs[BLOCK * 80];
    const int64_t row = left_row(width);
    to_left(rows, scratch_row(width), filled, width, pairs, row);
    transpose(pairs, row, filled, (width / 2 + 7) / 8 * 8, lanes, BLOCK);
  }

private:
  static vf pair(vf low, vf high) {
    const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(high)), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(to_bf16(low)), upper));
  }
};

template <> struct FormatOf<bf16> {
  using type = Paired;
};

#endif

} // namespace jepa::JEPA_ISA
