// Squares are added in double within each block: no sum overflows, and the order is that of the blocks.
#include "grad_norm/grad_norm.h"

#include "common/floats.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace jepa::JEPA_ISA {

template <class T> static double squares_of(const T* x, int64_t n) {
  vd even[2] = {dzero(), dzero()}, odd[2] = {dzero(), dzero()};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    add_squares(load(x + i), even);
    add_squares(load(x + i + W), odd);
  }
  for (; i < n; i += W) add_squares(n - i < W ? load(x + i, static_cast<int>(n - i)) : load(x + i), even);
  return (hsum(even[0]) + hsum(even[1])) + (hsum(odd[0]) + hsum(odd[1]));
}

void grad_norm_cpu(const GradNormParams& p) {
  for (int64_t i = 0; i < p.count; ++i) require_float(p.blocks[i].dtype);
  parallel_for(p.count, p.threads, [&](int64_t begin, int64_t end) {
    for (GradNormBlock* b = p.blocks + begin; b != p.blocks + end; ++b)
      with_float(b->dtype, [&](auto x) {
        b->squares = squares_of(static_cast<const decltype(x)*>(b->grad), b->numel);
      });
  });
}

} // namespace jepa::JEPA_ISA
