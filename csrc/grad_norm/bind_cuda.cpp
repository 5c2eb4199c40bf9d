#if JEPA_CUDA
#include "common/tensor.h"
#include "grad_norm/grad_norm.h"

namespace jepa {
namespace grad_norm_cuda_bindings {

// tables: of each dtype of gradient, int64 [chunks, 2] on the device, rows of GradNormChunk; and that dtype.
static Tensor forward_cuda(const std::vector<std::pair<Tensor, py::object>>& tables) {
  int64_t count = 0;
  for (const auto& [chunks, dtype] : tables) count += chunks.size(0);
  const Tensor& first = tables.front().first;
  const Tensor partial = first.new_empty({count}, DType::f64), norm = first.new_empty({}, DType::f32);
  const int device = first.device;
  void* const stream = first.stream();
  std::vector<GradNormCudaParams> parts;
  double* own = partial.data<double>();
  for (const auto& [chunks, dtype] : tables) {
    parts.push_back(
        {chunks.data<const GradNormChunk>(), chunks.size(0), dtype_of(dtype), own, device, stream});
    own += chunks.size(0);
  }
  {
    py::gil_scoped_release nogil;
    for (const GradNormCudaParams& part : parts) grad_norm_cuda(part);
    grad_norm_sum_cuda({partial.data<double>(), count, norm.data<float>(), device, stream});
  }
  return norm;
}

} // namespace grad_norm_cuda_bindings

void bind_grad_norm_cuda(py::module_& m) {
  using namespace grad_norm_cuda_bindings;
  m.def("grad_norm_forward_cuda", &forward_cuda);
}

} // namespace jepa
#endif
