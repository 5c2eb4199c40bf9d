#include "sigreg/sigreg.h"

#include "common/tensor.h"

namespace jepa {
namespace sigreg_bindings {

static void directions(const Tensor& out, int64_t step, int64_t seed) {
  const SigregDirectionsParams p{
      out.data<float>(),           out.size(0),    out.size(1), static_cast<uint64_t>(seed),
      static_cast<uint64_t>(step), torch_threads()};
  py::gil_scoped_release nogil;
  sigreg_directions_cpu(p);
}

// z [V, N, E], moments [V, 2, T, K]. Small calls stay on one thread.
static sigreg::Shape shape_of(const Tensor& z, const Tensor& moments, double t_max) {
  const int64_t knots = moments.size(2), slices = moments.size(3);
  const bool small = slices * (z.size(0) * z.size(1) + 1) * z.size(2) < (1 << 18);
  const double delta = t_max / static_cast<double>(knots - 1);
  return {z.size(0), z.size(1), z.size(2), slices, knots, delta, small ? 1 : torch_threads()};
}

// z fp32, contiguous; what backward needs, or an empty tensor.
static Tensor moments(const Tensor& z, const Tensor& out, double t_max, int64_t step, int64_t seed,
                      bool keep) {
  const sigreg::Shape at = shape_of(z, out, t_max);
  const Tensor kept = out.new_empty({keep ? at.kept() : 0});
  const Tensor scratch = out.new_empty({sigreg::forward_scratch(at)});
  const SigregMomentsParams p{at,
                              z.data<float>(),
                              static_cast<uint64_t>(seed),
                              static_cast<uint64_t>(step),
                              out.data<float>(),
                              keep ? kept.data<float>() : nullptr,
                              scratch.data<float>()};
  {
    py::gil_scoped_release nogil;
    sigreg_moments_cpu(p);
  }
  return kept;
}

static void forward(const Tensor& moments, const Tensor& loss, double t_max) {
  sigreg::Shape at{};
  at.views = moments.size(0);
  at.knots = moments.size(2);
  at.slices = moments.size(3);
  at.delta = t_max / static_cast<double>(at.knots - 1);
  const SigregForwardParams p{at, moments.data<float>(), loss.data<float>()};
  py::gil_scoped_release nogil;
  sigreg_forward_cpu(p);
}

// dz contiguous, of any type.
static void backward(const Tensor& dz, const Tensor& moments, const Tensor& kept, double t_max,
                     double scale) {
  const sigreg::Shape at = shape_of(dz, moments, t_max);
  const Tensor scratch = moments.new_empty({sigreg::backward_scratch(at)});
  const SigregBackwardParams p{at,       moments.data<float>(), kept.data<float>(), scale, dz.data(),
                               dz.dtype, scratch.data<float>()};
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
