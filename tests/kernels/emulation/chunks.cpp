// The CUDA faces of the ops that go through tables of chunks, with their kernels on the host.
#include "common/blocks.cpp"
#include "common/dlpack.cpp"
#include "common/tensor.cpp"
#include "ema_update/ema_update.h"

namespace jepa {

void refuse(DType) { throw std::runtime_error("a type that no kernel is built for"); }
void ema_update_cpu(const EmaUpdateParams&) {}

void bind_adamw_ema_cuda(py::module_&);
void bind_ema_update(py::module_&);
void bind_grad_norm_cuda(py::module_&);

} // namespace jepa

PYBIND11_MODULE(chunks, m) {
  jepa::bind_adamw_ema_cuda(m);
  jepa::bind_ema_update(m);
  jepa::bind_grad_norm_cuda(m);
}
