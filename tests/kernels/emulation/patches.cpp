// The CUDA face of embed_patches, with its kernels on the host.
#define JEPA_CUDA 1
#include "common/tensor.cpp"
#include "embed_patches/bind_cuda.cpp"

namespace jepa {

void refuse(DType) { throw std::runtime_error("a type that no kernel is built for"); }

} // namespace jepa

PYBIND11_MODULE(patches, m) { jepa::bind_embed_patches_cuda(m); }
