#include "ema_update/ema_update.h"

#include <vector>

#include "common/tensor.h"
#include "common/tensor_lists.h"

namespace jepa {
namespace ema_update_bindings {

static EmaForm form_of(const std::string& name) {
  if (name == "ijepa") return EmaForm::ijepa;
  return name == "vjepa2" ? EmaForm::vjepa2 : EmaForm::lerp;
}

// lists: of targets, online weights and shadows, the last of which may be empty.
static std::vector<EmaTensor> rows_of(const TensorLists& lists) {
  std::vector<EmaTensor> rows;
  rows.reserve(lists[0].size());
  for (size_t i = 0; i < lists[0].size(); ++i) {
    const auto &t = lists[0].at(i), &o = lists[1].at(i);
    rows.push_back({static_cast<float*>(t.address), o.address, nullptr, t.numel, o.dtype, DType::f32});
    if (lists[2].empty()) continue;
    const auto& s = lists[2].at(i);
    rows.back().shadow = s.address;
    rows.back().shadow_dtype = s.dtype;
  }
  return rows;
}

static double value_of(const Tensor& momentum) {
  return momentum.dtype == DType::f64 ? *momentum.data<double>() : *momentum.data<float>();
}

static void run_cpu(const TensorLists& lists, const Tensor& momentum, const std::string& form) {
  const std::vector<EmaTensor> rows = rows_of(lists);
  const EmaUpdateParams params{rows.data(), static_cast<int64_t>(rows.size()), value_of(momentum),
                               form_of(form), torch_threads()};
  py::gil_scoped_release nogil;
  ema_update_cpu(params);
}

#if JEPA_CUDA
// chunks: int64 [chunks, 4] on the device, rows of EmaChunk; online, shadow: the torch.dtype of all, or None.
static void run_cuda(const Tensor& chunks, py::handle online, py::handle shadow, const Tensor& momentum,
                     const std::string& form) {
  const bool on_device = momentum.device >= 0;
  const EmaUpdateCudaParams params{chunks.data<const EmaChunk>(),
                                   chunks.size(0),
                                   dtype_of(online),
                                   dtype_of(shadow),
                                   on_device ? 0.0 : value_of(momentum),
                                   on_device ? momentum.data() : nullptr,
                                   momentum.dtype,
                                   form_of(form),
                                   chunks.device,
                                   chunks.stream()};
  py::gil_scoped_release nogil;
  ema_update_cuda(params);
}
#endif

} // namespace ema_update_bindings

void bind_ema_update(py::module_& m) {
  using namespace ema_update_bindings;
  m.def("ema_update_run_cpu", &run_cpu);
#if JEPA_CUDA
  m.def("ema_update_run_cuda", &run_cuda);
#endif
}

} // namespace jepa
