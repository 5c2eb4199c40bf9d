#include "ema_update/ema_update.h"

#include <vector>

#include "common/tensor.h"

namespace jepa {

using Tensors = std::vector<Tensor>;

static EmaForm form_of(const std::string& name) {
  if (name == "ijepa") return EmaForm::ijepa;
  return name == "vjepa2" ? EmaForm::vjepa2 : EmaForm::lerp;
}

static std::vector<EmaTensor> table(const Tensors& target, const Tensors& online, const Tensors& shadow) {
  std::vector<EmaTensor> rows;
  rows.reserve(target.size());
  for (size_t i = 0; i < target.size(); ++i) {
    const bool copied = !shadow.empty();
    rows.push_back({target[i].data<float>(), online[i].data(), copied ? shadow[i].data() : nullptr,
                    target[i].numel(), online[i].dtype, copied ? shadow[i].dtype : DType::f32});
  }
  return rows;
}

static double value_of(const Tensor& momentum) {
  return momentum.dtype == DType::f64 ? *momentum.data<double>() : *momentum.data<float>();
}

static void forward_cpu(const Tensors& target, const Tensors& online, const Tensors& shadow,
                        const Tensor& momentum, const std::string& form) {
  const std::vector<EmaTensor> rows = table(target, online, shadow);
  const EmaUpdateParams params{rows.data(), static_cast<int64_t>(rows.size()), value_of(momentum),
                               form_of(form), torch_threads()};
  py::gil_scoped_release nogil;
  ema_update_cpu(params);
}

#if JEPA_CUDA
// chunks: int64 [chunks, 4] on the device, rows of EmaChunk; online, shadow: the torch.dtype of all, or None.
static void forward_cuda(const Tensor& chunks, py::handle online, py::handle shadow, const Tensor& momentum,
                         const std::string& form) {
  const bool on_device = momentum.device_index() >= 0;
  ema_update_cuda({chunks.data<const EmaChunk>(), chunks.size(0), dtype_of(online), dtype_of(shadow),
                   on_device ? 0.0 : value_of(momentum), on_device ? momentum.data() : nullptr,
                   momentum.dtype, form_of(form), chunks.device_index(), chunks.stream()});
}
#endif

void bind_ema_update(py::module_& m) {
  m.def("ema_update_forward_cpu", &forward_cpu);
#if JEPA_CUDA
  m.def("ema_update_forward_cuda", &forward_cuda);
#endif
}

} // namespace jepa
