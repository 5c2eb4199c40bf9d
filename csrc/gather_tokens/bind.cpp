#include "gather_tokens/gather_tokens.h"

#include <vector>

#include "common/tensor.h"

namespace jepa {
namespace gather_tokens_bindings {

static Tensor forward_cpu(const Tensor& x, const Tensor& ids, const std::optional<Tensor>& cu) {
  const int64_t channels = x.size(2);
  const Runs runs(cu, ids.numel());
  Tensor out = cu ? x.new_empty({ids.size(0), channels}) : x.new_empty({ids.size(0), ids.size(1), channels});
  KeptRows at = kept_rows(ids, runs, x.size(0), x.size(1));
  if (at.batch == 0) at.sequences = 0; // rows of no image stand for nothing
  const GatherTokensForwardParams params{at,
                                         x.data(),
                                         x.stride(0),
                                         x.stride(1),
                                         x.stride(2),
                                         out.data(),
                                         channels,
                                         static_cast<int>(size_of(x.dtype)),
                                         torch_threads()};
  py::gil_scoped_release nogil;
  gather_tokens_forward_cpu(params);
  return out;
}

static Tensor backward_cpu(const Tensor& grad, const Tensor& ids, const std::optional<Tensor>& cu,
                           int64_t batch, int64_t count) {
  const int64_t channels = grad.size(-1), rows = ids.numel();
  const Runs runs(cu, rows);
  Tensor dx = grad.new_empty({batch, count, channels});
  std::vector<int32_t> first(batch * count + 1), source(rows);
  const GatherTokensBackwardParams params{kept_rows(ids, runs, batch, count),
                                          grad.data(),
                                          grad.stride(0),
                                          grad.stride(-2),
                                          grad.stride(-1),
                                          dx.data(),
                                          channels,
                                          first.data(),
                                          source.data(),
                                          grad.dtype,
                                          torch_threads()};
  py::gil_scoped_release nogil;
  gather_tokens_backward_cpu(params);
  return dx;
}

} // namespace gather_tokens_bindings

void bind_gather_tokens(py::module_& m) {
  using namespace gather_tokens_bindings;
  m.def("gather_tokens_forward_cpu", &forward_cpu);
  m.def("gather_tokens_backward_cpu", &backward_cpu);
}

} // namespace jepa
