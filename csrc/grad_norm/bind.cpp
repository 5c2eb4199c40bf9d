#include "grad_norm/grad_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/tensor.h"

namespace jepa {

constexpr int64_t BLOCK = 1 << 14; // elements: the order of the sum depends on it, and on nothing else

static std::vector<GradNormBlock> blocks_of(const py::list& grads) {
  std::vector<GradNormBlock> blocks;
  for (const py::handle grad : grads) {
    const int64_t numel = numel_of(grad);
    const DType dtype = dtype_of(grad.attr("dtype"));
    const char* address = static_cast<const char*>(address_of(grad));
    for (int64_t i = 0; i < numel; i += BLOCK)
      blocks.push_back({address + i * size_of(dtype), std::min(BLOCK, numel - i), dtype, 0.0});
  }
  return blocks;
}

static Tensor forward_cpu(const py::list& grads) {
  std::vector<GradNormBlock> blocks = blocks_of(grads);
  const Tensor norm = Tensor::from(grads[0]).new_empty({}, DType::f32);
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

void bind_grad_norm_cuda(py::module_&);

void bind_grad_norm(py::module_& m) {
  m.def("grad_norm_forward_cpu", &forward_cpu);
#if JEPA_CUDA
  bind_grad_norm_cuda(m);
#endif
}

} // namespace jepa
