// The CUDA face of rope, with its kernels on the host.
#define JEPA_CUDA 1
#include <stdexcept>

#include "common/blocks.cpp"
#include "common/dlpack.cpp"
#include "common/tensor.cpp"
#include "rope/bind.cpp"

namespace jepa {

void refuse(DType) { throw std::runtime_error("a type that no kernel is built for"); }
void rope_cpu(const RopeParams&) {}
void rope_turns_cpu(const RopeTurnsParams&) {}

} // namespace jepa

PYBIND11_MODULE(host, m) { jepa::bind_rope(m); }
