// Lines of elements of any type, `step` apart, to and from fp32.
#pragma once
#include "common/simd.h"

namespace jepa::JEPA_ISA {

// `row` is written up to a whole register.
template <class T> static void add_line(const T* p, int64_t step, int64_t length, float* row) {
  for (int64_t x = 0; x < length; x += W)
    store(row + x, add(load(row + x), load(p + x * step, step, part(length - x))));
}

template <class T> static void write_line(const float* row, int64_t length, T* p) {
  int64_t x = 0;
  for (; x + W <= length; x += W) store(p + x, load(row + x));
  const int rest = static_cast<int>(length - x);
  if (rest) store(p + x, load(row + x, rest), rest); // nothing may lie behind the row
}

} // namespace jepa::JEPA_ISA
