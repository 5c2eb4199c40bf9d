// Rows to columns, eight by eight or four by four.
#pragma once
#include <cstdint>
#include <immintrin.h>

namespace jepa::JEPA_ISA {

// out[c][r] = in[r][c] for 8 rows and 8 columns.
static inline void transpose_8x8(const float* in, int64_t in_row, float* out, int64_t out_row) {
  __m256 x[8], y[8];
  for (int r = 0; r < 8; ++r) x[r] = _mm256_loadu_ps(in + r * in_row);
  for (int r = 0; r < 8; r += 2) {
    y[r] = _mm256_unpacklo_ps(x[r], x[r + 1]);
    y[r + 1] = _mm256_unpackhi_ps(x[r], x[r + 1]);
  }
  for (int r = 0; r < 8; r += 4) {
    x[r] = _mm256_shuffle_ps(y[r], y[r + 2], 0x44);
    x[r + 1] = _mm256_shuffle_ps(y[r], y[r + 2], 0xEE);
    x[r + 2] = _mm256_shuffle_ps(y[r + 1], y[r + 3], 0x44);
    x[r + 3] = _mm256_shuffle_ps(y[r + 1], y[r + 3], 0xEE);
  }
  for (int r = 0; r < 4; ++r) {
    _mm256_storeu_ps(out + r * out_row, _mm256_permute2f128_ps(x[r], x[r + 4], 0x20));
    _mm256_storeu_ps(out + (r + 4) * out_row, _mm256_permute2f128_ps(x[r], x[r + 4], 0x31));
  }
}

// The same for 4 rows and 4 columns.
static inline void transpose_4x4(const float* in, int64_t in_row, float* out, int64_t out_row) {
  __m128 a = _mm_loadu_ps(in), b = _mm_loadu_ps(in + in_row), c = _mm_loadu_ps(in + 2 * in_row),
         d = _mm_loadu_ps(in + 3 * in_row);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out, a);
  _mm_storeu_ps(out + out_row, b);
  _mm_storeu_ps(out + 2 * out_row, c);
  _mm_storeu_ps(out + 3 * out_row, d);
}

// [rows][width] -> [width][out_row]; rows and width are multiples of 8.
static void transpose(const float* in, int64_t in_row, int64_t rows, int64_t width, float* out,
                      int64_t out_row) {
  for (int64_t r = 0; r < rows; r += 8)
    for (int64_t c = 0; c < width; c += 8)
      transpose_8x8(in + r * in_row + c, in_row, out + c * out_row + r, out_row);
}

} // namespace jepa::JEPA_ISA
