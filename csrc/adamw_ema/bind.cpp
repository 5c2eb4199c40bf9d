#include "adamw_ema/adamw_ema.h"

#include <vector>

#include "common/tensor.h"

namespace jepa {

// One entry of a list that may be empty altogether; a missing tensor has no elements.
struct Entry {
  void* address = nullptr;
  DType dtype = DType::f32;

  Entry(const py::list& tensors, size_t i, bool typed) {
    if (tensors.empty() || numel_of(tensors[i]) == 0) return;
    address = address_of(tensors[i]);
    if (typed) dtype = dtype_of(tensors[i].attr("dtype"));
  }
  float* f32() const { return static_cast<float*>(address); }
};

static void require_low(const Entry& shadow) {
  if (shadow.address && shadow.dtype != DType::bf16 && shadow.dtype != DType::f16) refuse(shadow.dtype);
}

// Hundreds of tensors a call, known to be dense: only what the kernel needs is read of each.
static std::vector<AdamwEmaTensor> table(const py::list& params, const py::list& grads,
                                         const py::list& exp_avgs, const py::list& exp_avg_sqs,
                                         const py::list& steps, const py::list& targets,
                                         const py::list& online_shadow, const py::list& target_shadow,
                                         bool skip) {
  std::vector<AdamwEmaTensor> rows;
  rows.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const Entry grad(grads, i, true), online(online_shadow, i, true), copy(target_shadow, i, true);
    require_low(online);
    require_low(copy);
    AdamwEmaTensor row{};
    row.param = static_cast<float*>(address_of(params[i]));
    row.numel = numel_of(params[i]);
    row.grad_dtype = grad.dtype;
    row.target = Entry(targets, i, false).f32();
    row.online_shadow = online.address;
    row.target_shadow = copy.address;
    row.online_shadow_dtype = online.dtype;
    row.target_shadow_dtype = copy.dtype;
    if (grad.address && !skip) {
      row.grad = grad.address;
      row.exp_avg = Entry(exp_avgs, i, false).f32();
      row.exp_avg_sq = Entry(exp_avg_sqs, i, false).f32();
      row.step = *Entry(steps, i, false).f32();
    }
    rows.push_back(row);
  }
  return rows;
}

static void forward_cpu(const py::list& params, const py::list& grads, const py::list& exp_avgs,
                        const py::list& exp_avg_sqs, const py::list& steps, const py::list& targets,
                        const py::list& online_shadow, const py::list& target_shadow, const Tensor& scalars,
                        const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                        double beta1, double beta2, double eps, bool maximize) {
  const bool skip = found_inf && *found_inf->data<float>() != 0;
  const std::vector<AdamwEmaTensor> rows =
      table(params, grads, exp_avgs, exp_avg_sqs, steps, targets, online_shadow, target_shadow, skip);
  const double *s = scalars.data<double>(), scale = grad_scale ? *grad_scale->data<float>() : 1.0;
  const AdamwEmaParams p{
      rows.data(), static_cast<int64_t>(rows.size()), s[0],           s[1], s[2], beta1, beta2,
      eps,         maximize ? -scale : scale,         torch_threads()};
  py::gil_scoped_release nogil;
  adamw_ema_cpu(p);
}

void bind_adamw_ema(py::module_& m) { m.def("adamw_ema_forward_cpu", &forward_cpu); }

} // namespace jepa
