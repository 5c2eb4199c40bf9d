// Compute-bound: 4 n m D operations forward, 10 n m D backward, in register tiles over fp32 copies of one
// head of one sequence.
#include "masked_attention/masked_attention.h"

#include "common/floats.h"
#include "masked_attention/backward.h"
#include "masked_attention/forward.h"

namespace jepa::JEPA_ISA {

void masked_attention_forward_cpu(const MaskedAttentionForwardParams& p) {
  with_float(p.shape.dtype, [&](auto x) { forward<decltype(x)>(p); });
}

void masked_attention_backward_cpu(const MaskedAttentionBackwardParams& p) {
  with_float(p.shape.dtype, [&](auto x) { backward<decltype(x)>(p); });
}

} // namespace jepa::JEPA_ISA
