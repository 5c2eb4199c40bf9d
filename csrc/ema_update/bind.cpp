#include "ema_update/ema_update.h"

#include <vector>

#include "common/tensor.h"

namespace jepa {

static EmaForm form_of(const std::string& name) {
  if (name == "ijepa") return EmaForm::ijepa;
  return name == "vjepa2" ? EmaForm::vjepa2 : EmaForm::lerp;
}

// Hundreds of tensors a call, known to be contiguous: only what the kernel needs is read of each.
static std::vector<EmaTensor> table(const py::list& target, const py::list& online, const py::list& shadow) {
  std::vector<EmaTensor> rows;
  rows.reserve(target.size());
  for (size_t i = 0; i < target.size(); ++i) {
    const bool copied = !shadow.empty();
    const py::handle o = online[i], s = copied ? py::handle(shadow[i]) : py::handle();
    rows.push_back({static_cast<float*>(address_of(target[i])), address_of(o),
                    copied ? address_of(s) : nullptr, numel_of(target[i]), dtype_of(o.attr("dtype")),
                    copied ? dtype_of(s.attr("dtype")) : DType::f32});
  }
  return rows;
}

static double value_of(const Tensor& momentum) {
  return momentum.dtype == DType::f64 ? *momentum.data<double>() : *momentum.data<float>();
}

static void forward_cpu(const py::list& target, const py::list& online, const py::list& shadow,
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
