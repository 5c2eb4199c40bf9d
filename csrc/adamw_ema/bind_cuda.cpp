#if JEPA_CUDA
#include "adamw_ema/adamw_ema.h"
#include "common/tensor.h"

namespace jepa {
namespace adamw_ema_cuda_bindings {

static const float* address_or_null(const std::optional<Tensor>& x) {
  return x ? x->data<const float>() : nullptr;
}

// chunks: int64 [chunks, 9] on the device, rows of AdamwEmaChunk; each dtype is a torch.dtype, or None.
static void forward_cuda(const Tensor& chunks, py::handle grad, py::handle online_shadow,
                         py::handle target_shadow, const Tensor& scalars,
                         const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                         double beta1, double beta2, double eps, bool maximize) {
  AdamwEmaCudaParams p{};
  p.chunks = chunks.data<const AdamwEmaChunk>();
  p.count = chunks.size(0);
  p.grad_dtype = grad.is_none() ? DType::f32 : dtype_of(grad);
  p.online_shadow_dtype = dtype_of(online_shadow);
  p.target_shadow_dtype = dtype_of(target_shadow);
  if (scalars.device >= 0)
    p.device_scalars = scalars.data<const AdamwEmaScalars>();
  else
    p.scalars = *scalars.data<const AdamwEmaScalars>();
  p.grad_scale = address_or_null(grad_scale);
  p.found_inf = address_or_null(found_inf);
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.eps = static_cast<float>(eps);
  p.maximize = maximize;
  p.device = chunks.device;
  p.stream = chunks.stream();
  py::gil_scoped_release nogil;
  adamw_ema_cuda(p);
}

} // namespace adamw_ema_cuda_bindings

void bind_adamw_ema_cuda(py::module_& m) {
  using namespace adamw_ema_cuda_bindings;
  m.def("adamw_ema_forward_cuda", &forward_cuda);
}

} // namespace jepa
#endif
