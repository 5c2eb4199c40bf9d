// What the build holds, the ISA level in use, and the check of patch ids.
#include "common/blocks.h"
#include "common/dispatch.h"
#include "common/dlpack.h"
#include "common/sizes_of.h"
#include "common/tensor.h"
#include "common/tensor_lists.h"

#if JEPA_CUDA
#include <cuda_runtime_api.h>
#endif

namespace jepa {
namespace common_bindings {

#if JEPA_CUDA
// Why kernels can't run on a device; empty where they can. The build holds machine code for capabilities 8.x
// and 9.0; for later ones the driver compiles code of the toolkit's version, if it knows that.
static std::string device_reason(int device) {
  int major = 0, minor = 0, driver = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDriverGetVersion(&driver);
  const auto dotted = [](int whole, int part) { return std::to_string(whole) + "." + std::to_string(part); };
  const auto release = [&](int version) { return dotted(version / 1000, version % 1000 / 10); };
  if (major < 8) return "needs a GPU of compute capability 8.0 or later, got " + dotted(major, minor);
  if (major == 8 || major == 9 || driver >= CUDART_VERSION) return "";
  return "needs a driver of CUDA " + release(CUDART_VERSION) + " for a GPU of compute capability " +
         dotted(major, minor) + ", got one of " + release(driver);
}
#endif

// Why CUDA kernels can't run in this process, on any device; empty where they can.
static std::string cuda_reason() {
#if JEPA_CUDA
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return std::string("no usable CUDA driver: ") + cudaGetErrorString(status);
  std::string why = "no CUDA device";
  for (int i = 0; i < count && !why.empty(); ++i) why = device_reason(i);
  return why;
#else
  return "this build has no CUDA kernels; build with JEPA_CUDA=1 where nvcc is";
#endif
}

static py::dict build_info() {
  py::dict info;
#if JEPA_CUDA
  info["cuda"] = CUDART_VERSION;
#else
  info["cuda"] = py::none();
#endif
  info["compiler"] = __VERSION__;
  info["isa"] = isa_name(isa());
  return info;
}

// The first place in [0, n) where ids leave [0, count) or do not increase within their row; -1: none.
// Rows are those of the last dimension, or packed runs; ids past the last one are not read. ids is int64 and
// contiguous.
static int64_t first_bad_id(py::handle ids, int64_t count, py::handle cu_seqlens) {
  const dlpack::Tensor seen = dlpack::read(ids);
  const int64_t *p = static_cast<const int64_t*>(dlpack::address_of(seen)), total = dlpack::numel_of(seen);
  const int64_t length = seen.dims ? seen.shape[seen.dims - 1] : 1;
  const bool packed = !cu_seqlens.is_none();
  const Runs runs(packed ? std::optional(Tensor::from(cu_seqlens)) : std::nullopt, total);
  const int64_t rows = packed ? runs.count() : total / std::max<int64_t>(length, 1);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t begin = packed ? runs.starts()[r] : r * length,
                  end = begin + (packed ? runs.length(r) : length);
    int64_t before = -1;
    for (int64_t i = begin; i < end; ++i) {
      if (p[i] <= before || p[i] >= count) return i;
      before = p[i];
    }
  }
  return -1;
}

} // namespace common_bindings

void bind_common(py::module_& m) {
  using namespace common_bindings;
  m.def("build_info", &build_info);
  m.def("cuda_reason", &cuda_reason);
  m.def("isa", [] { return isa_name(isa()); });
  m.def("is_amd", &is_amd);
  m.def("set_isa", &set_isa, py::arg("name"));
  py::class_<TensorLists>(m, "TensorLists")
      .def("__eq__", &TensorLists::operator==, py::is_operator())
      .def("__hash__", &TensorLists::hash)
      .def("holds", &TensorLists::holds, py::arg("lists"));
  m.def("read_lists", &TensorLists::read, py::arg("lists"), py::arg("plain"));
  m.def("first_bad_id", &first_bad_id);
  m.def("sizes_of", [](const std::vector<std::string>& tensors) {
    return py::cpp_function([of = SizesOf(tensors)](const py::args& given) { return of.sizes(given); });
  });
  m.def("block_bytes", [] {
    const BlockBytes found = block_bytes();
    return py::dict(py::arg("held") = found.held, py::arg("most_held") = found.most_held,
                    py::arg("waiting") = found.waiting);
  });
  m.def("reset_most_held", &reset_most_held);
  m.def("release_blocks", &release_blocks);
}

} // namespace jepa
