// The CUDA faces of the ops that go through tables of chunks, with their kernels on the host, and the choice
// of a device.
#include "common/bind.cpp"
#include "common/blocks.cpp"
#include "common/dlpack.cpp"
#include "common/sizes_of.cpp"
#include "common/tensor.cpp"
#include "ema_update/ema_update.h"

namespace jepa {

void refuse(DType) { throw std::runtime_error("a type that no kernel is built for"); }
void ema_update_cpu(const EmaUpdateParams&) {}
Isa isa() { return Isa::none; }
bool set_isa(const char*) { return false; }
const char* isa_name(Isa) { return "none"; }
bool is_amd() { return false; }

void bind_adamw_ema_cuda(py::module_&);
void bind_ema_update(py::module_&);
void bind_grad_norm_cuda(py::module_&);

} // namespace jepa

PYBIND11_MODULE(chunks, m) {
  jepa::bind_adamw_ema_cuda(m);
  jepa::bind_ema_update(m);
  jepa::bind_grad_norm_cuda(m);
  m.def("cuda_reason", [](const std::vector<int>& devices, int driver) {
    capabilities = devices, driver_version = driver;
    return jepa::common_bindings::cuda_reason();
  });
}
