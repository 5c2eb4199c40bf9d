#include "grad_norm/grad_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/tensor.h"
#include "common/tensor_lists.h"

namespace jepa {
namespace grad_norm_bindings {

constexpr int64_t BLOCK = 1 << 14; // elements: the order of the sum depends on it, and on nothing else

static std::vector<GradNormBlock> blocks_of(const TensorLists& lists) {
  std::vector<GradNormBlock> blocks;
  for (const auto& grad : lists[0]) {
    const char* address = static_cast<const char*>(grad.address);
    for (int64_t i = 0; i < grad.numel; i += BLOCK)
      blocks.push_back({address + i * size_of(grad.dtype), std::min(BLOCK, grad.numel - i), grad.dtype, 0.0});
  }
  return blocks;
}

// lists: one, of the gradients, of which `first` is one.
static Tensor run_cpu(const TensorLists& lists, const Tensor& first) {
  std::vector<GradNormBlock> blocks = blocks_of(lists);
  const Tensor norm = first.new_empty({}, DType::f32);
  const GradNormParams params{blocks.data(), static_cast<int64_t>(blocks.size()), torch_threads()};
  {
    py::gil_scoped_release nogil;
    grad_norm_cpu(params);
  }
  double squares = 0;
  for (const GradNormBlock& block : blocks) squares += block.squares;
  *norm.data<float>() = static_cast<float>(std::sqrt(squares));
  return norm;
}

} // namespace grad_norm_bindings

void bind_grad_norm_cuda(py::module_&);

void bind_grad_norm(py::module_& m) {
  using namespace grad_norm_bindings;
  m.def("grad_norm_run_cpu", &run_cpu);
#if JEPA_CUDA
  bind_grad_norm_cuda(m);
#endif
}

} // namespace jepa
