#include "adamw_ema/adamw_ema.h"

#include <vector>

#include "common/tensor.h"

namespace jepa {
namespace adamw_ema_bindings {

static float value_of(const std::optional<Tensor>& scalar, float otherwise) {
  return scalar ? *scalar->data<float>() : otherwise;
}

// The tensors of a call, known to be dense. Hundreds of them: only what the kernel needs is read of each. An
// empty tensor, whose address is null, or an empty list stands for what is missing.
class AdamwEmaTable {
public:
  AdamwEmaTable(const py::list& params, const py::list& grads, const py::list& exp_avgs,
                const py::list& exp_avg_sqs, const py::list& steps, const py::list& targets,
                const py::list& online_shadow, const py::list& target_shadow) {
    rows_.resize(params.size());
    for (size_t i = 0; i < rows_.size(); ++i) {
      AdamwEmaTensor& row = rows_[i];
      row.param = address<float>(params, i);
      row.exp_avg = address<float>(exp_avgs, i);
      row.exp_avg_sq = address<float>(exp_avg_sqs, i);
      row.target = address<float>(targets, i);
      row.online_shadow = address<void>(online_shadow, i);
      row.target_shadow = address<void>(target_shadow, i);
      row.online_shadow_dtype = row.online_shadow ? low_dtype_of(online_shadow[i]) : DType::bf16;
      row.target_shadow_dtype = row.target_shadow ? low_dtype_of(target_shadow[i]) : DType::bf16;
      row.numel = numel_of(params[i]);
      steps_.push_back(address<float>(steps, i));
    }
    take(grads);
  }

  // Other gradients of the same parameters, for one run.
  void take(const py::list& grads) {
    for (size_t i = 0; i < rows_.size(); ++i) {
      rows_[i].grad = address<void>(grads, i);
      rows_[i].grad_dtype = rows_[i].grad ? dtype_of(grads[i].attr("dtype")) : DType::f32;
    }
  }

  // One step more for each parameter that has a gradient.
  void count() {
    for (size_t i = 0; i < rows_.size(); ++i)
      if (rows_[i].grad) ++*steps_[i];
  }

  void run(const Tensor& scalars, const std::optional<Tensor>& grad_scale, bool skip, double beta1,
           double beta2, double eps, bool maximize) {
    for (size_t i = 0; i < rows_.size(); ++i) {
      if (skip) rows_[i].grad = nullptr;
      if (rows_[i].grad) rows_[i].step = *steps_[i];
    }
    const double *s = scalars.data<double>(), scale = value_of(grad_scale, 1.0F);
    const AdamwEmaParams p{
        rows_.data(), static_cast<int64_t>(rows_.size()), s[0],           s[1], s[2], beta1, beta2,
        eps,          maximize ? -scale : scale,          torch_threads()};
    py::gil_scoped_release nogil;
    adamw_ema_cpu(p);
  }

private:
  template <class T> static T* address(const py::list& tensors, size_t i) {
    return tensors.empty() ? nullptr : static_cast<T*>(address_of(tensors[i]));
  }

  static DType low_dtype_of(py::handle shadow) {
    const DType dtype = dtype_of(shadow.attr("dtype"));
    if (dtype != DType::bf16 && dtype != DType::f16) refuse(dtype);
    return dtype;
  }

  std::vector<AdamwEmaTensor> rows_;
  std::vector<float*> steps_;
};

static void forward_cpu(const py::list& params, const py::list& grads, const py::list& exp_avgs,
                        const py::list& exp_avg_sqs, const py::list& steps, const py::list& targets,
                        const py::list& online_shadow, const py::list& target_shadow, const Tensor& scalars,
                        const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                        double beta1, double beta2, double eps, bool maximize) {
  AdamwEmaTable table(params, grads, exp_avgs, exp_avg_sqs, steps, targets, online_shadow, target_shadow);
  table.run(scalars, grad_scale, value_of(found_inf, 0.0F) != 0, beta1, beta2, eps, maximize);
}

// With tensors that stay where they are, and the steps counted here too.
static void step_cpu(AdamwEmaTable& table, const py::list& grads, const Tensor& scalars,
                     const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                     double beta1, double beta2, double eps, bool maximize) {
  const bool skip = value_of(found_inf, 0.0F) != 0;
  table.take(grads);
  if (!skip) table.count();
  table.run(scalars, grad_scale, skip, beta1, beta2, eps, maximize);
}

} // namespace adamw_ema_bindings

void bind_adamw_ema_cuda(py::module_&);

void bind_adamw_ema(py::module_& m) {
  using namespace adamw_ema_bindings;
  m.def("adamw_ema_forward_cpu", &forward_cpu);
  py::class_<AdamwEmaTable>(m, "adamw_ema_table_cpu")
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&, const py::list&,
                    const py::list&, const py::list&, const py::list&>())
      .def("step", &step_cpu);
#if JEPA_CUDA
  bind_adamw_ema_cuda(m);
#endif
}

} // namespace jepa
