#include "collapse_stats/collapse_stats.h"

#include "common/tensor.h"

namespace jepa {
namespace collapse_stats_bindings {

static void collapse_stats(const Tensor& z, const Tensor& out) {
  const CollapseStatsParams p{z.data(),    z.size(0), z.size(1),         z.stride(0),
                              z.stride(1), z.dtype,   out.data<float>(), torch_threads()};
  py::gil_scoped_release nogil;
  collapse_stats_cpu(p);
}

} // namespace collapse_stats_bindings

void bind_collapse_stats(py::module_& m) {
  using namespace collapse_stats_bindings;
  m.def("collapse_stats", &collapse_stats);
}

} // namespace jepa
