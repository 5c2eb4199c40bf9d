#include "distance_weights/distance_weights.h"

#include <vector>

#include "common/tensor.h"

namespace jepa {
namespace distance_weights_bindings {

static PlacedRuns placed(const Tensor& ids, const Runs& runs) {
  return {ids.data<int64_t>(), runs.starts(), runs.starts() ? 0 : ids.size(-1), ids.numel()};
}

static Tensor forward_cpu(const Tensor& context_ids, const Tensor& target_ids,
                          const std::optional<Tensor>& cu, const std::optional<Tensor>& target_cu,
                          int64_t frames, int64_t height, int64_t width, double scale) {
  const Runs contexts(cu, context_ids.numel()), targets(target_cu, target_ids.numel());
  Tensor weights = context_ids.new_empty(context_ids.shape(), DType::f32);
  std::vector<float> places(4 * target_ids.numel());
  const DistanceWeightsForwardParams params{placed(context_ids, contexts),
                                            placed(target_ids, targets),
                                            cu ? contexts.count() : context_ids.size(0),
                                            frames * height * width,
                                            height,
                                            width,
                                            static_cast<float>(scale),
                                            places.data(),
                                            weights.data<float>(),
                                            torch_threads()};
  py::gil_scoped_release nogil;
  distance_weights_forward_cpu(params);
  return weights;
}

} // namespace distance_weights_bindings

void bind_distance_weights(py::module_& m) {
  using namespace distance_weights_bindings;
  m.def("distance_weights_forward_cpu", &forward_cpu);
}

} // namespace jepa
