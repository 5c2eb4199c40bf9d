// The CUDA face of masked_attention, with its kernels on the host.
#define JEPA_CUDA 1
#include "common/blocks.cpp"
#include "common/dlpack.cpp"
#include "common/hopper_host.cuh"
#include "common/tensor.cpp"
#include "masked_attention/bind_cuda.cpp"

#include <utility>

#include "matrix.h"

namespace jepa {

void refuse(DType) { throw std::runtime_error("a type that no kernel is built for"); }

} // namespace jepa

PYBIND11_MODULE(emulated, m) {
  jepa::bind_masked_attention_cuda(m);
  m.def("set_eager", [](bool eager) { jepa::eager = eager; });
  m.def("work",
        [] { return std::pair(std::exchange(jepa::multiplied, 0), std::exchange(jepa::fetched, 0)); });
  m.def("launches", [] { return std::exchange(jepa::launches, 0); });
}
