#include "sigreg/sigreg.h"

#include "common/tensor.h"

namespace jepa {
namespace sigreg_bindings {

static void directions(const Tensor& out, int64_t first, int64_t step, int64_t seed) {
  const SigregDirectionsParams p{
      out.data<float>(),           out.size(0),    out.size(1), first, static_cast<uint64_t>(seed),
      static_cast<uint64_t>(step), torch_threads()};
  py::gil_scoped_release nogil;
  sigreg_directions_cpu(p);
}

// Of `slices` slices from `first` on; moments [V, 2, T, K].
static SigregKnots knots_of(const Tensor& moments, int64_t slices, double t_max) {
  const int64_t knots = moments.size(2);
  return {moments.size(0), slices, knots, moments.size(3), t_max / static_cast<double>(knots - 1)};
}

// y [V * N, slices of the tile]
static void moments(const Tensor& y, const Tensor& out, int64_t first, double t_max) {
  const SigregKnots at = knots_of(out, y.size(1), t_max);
  const int64_t rows = at.views ? y.size(0) / at.views : 0;
  const SigregMomentsParams p{at, y.data<float>(), out.data<float>() + first, rows, torch_threads()};
  py::gil_scoped_release nogil;
  sigreg_moments_cpu(p);
}

static void forward(const Tensor& moments, const Tensor& loss, double t_max) {
  const SigregForwardParams p{knots_of(moments, moments.size(3), t_max), moments.data<float>(),
                              loss.data<float>()};
  py::gil_scoped_release nogil;
  sigreg_forward_cpu(p);
}

static void backward(const Tensor& y, const Tensor& moments, int64_t first, double t_max, double scale) {
  const SigregKnots at = knots_of(moments, y.size(1), t_max);
  const int64_t rows = at.views ? y.size(0) / at.views : 0;
  const SigregBackwardParams p{
      at, moments.data<float>() + first, y.data<float>(), rows, scale, torch_threads()};
  py::gil_scoped_release nogil;
  sigreg_backward_cpu(p);
}

} // namespace sigreg_bindings

void bind_sigreg(py::module_& m) {
  using namespace sigreg_bindings;
  m.def("sigreg_directions", &directions);
  m.def("sigreg_moments", &moments);
  m.def("sigreg_forward", &forward);
  m.def("sigreg_backward", &backward);
}

} // namespace jepa
