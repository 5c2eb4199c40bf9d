#include "latent_loss/latent_loss.h"

#include <string>
#include <utility>
#include <vector>

#include "common/tensor.h"

namespace jepa {
namespace latent_loss_bindings {

static LossKind kind_of(const std::string& name, double power) {
  if (name == "smooth_l1") return LossKind::smooth_l1;
  if (name == "l2" || power == 2.0) return LossKind::l2;
  return power == 1.0 ? LossKind::l1 : LossKind::power;
}

static DType unit_dtype(DType pred) { return pred == DType::f16 ? DType::f32 : pred; }

// pred [M, K, E], or [T, E] with cu_seqlens; target [B, N, E]; returns (loss, unit gradient or an empty
// tensor).
static std::pair<Tensor, Tensor>
forward_cpu(const Tensor& pred, const Tensor& target, const std::optional<Tensor>& ids,
            const std::optional<Tensor>& cu, const std::string& kind, double beta, bool normalize, double eps,
            const std::string& reduction, double power, int64_t levels, const std::optional<Tensor>& gain,
            const std::optional<Tensor>& shift, double norm_eps, const std::optional<Tensor>& weight,
            bool with_grad) {
  const int64_t channels = pred.size(-1), rows = cu ? pred.size(0) : pred.size(0) * pred.size(1);
  const DType type = unit_dtype(pred.dtype);
  Tensor loss = pred.new_empty({}, DType::f32);
  Tensor unit = !with_grad ? pred.new_empty({0}, type)
                : cu       ? pred.new_empty({rows, channels}, type)
                           : pred.new_empty({pred.size(0), pred.size(1), channels}, type);
  std::vector<double> row_loss(rows);
  std::vector<float> affine(gain ? 2 * channels : 0);
  const Runs runs(cu, rows);
  LatentLossForwardParams p{};
  p.pred = pred.data();
  p.target = target.data();
  p.ids = ids ? ids->data<int64_t>() : nullptr;
  p.cu_seqlens = runs.starts();
  p.sequences = target.size(0) == 0 ? 0 : cu ? runs.count() : pred.size(0); // with no image, none
  p.run_length = cu ? 0 : pred.size(1);
  p.rows = rows;
  p.batch = target.size(0);
  p.count = target.size(1);
  p.channels = channels;
  p.pred_run = pred.stride(0);
  p.pred_row = pred.stride(-2);
  p.pred_channel = pred.stride(-1);
  p.target_image = target.stride(0);
  p.target_token = target.stride(1);
  p.target_channel = target.stride(2);
  p.pred_dtype = pred.dtype;
  p.target_dtype = target.dtype;
  p.kind = kind_of(kind, power);
  p.scale = kind == "l1" && power == 2.0 ? 0.5 : 1.0; // d^2 / 2
  p.beta = static_cast<float>(beta);
  p.power = power;
  p.eps = static_cast<float>(eps);
  p.normalize = normalize;
  p.levels = levels;
  if (gain) {
    p.gain = gain->data();
    p.shift = shift->data();
    p.gain_stride = gain->stride(0);
    p.shift_stride = shift->stride(0);
    p.gain_dtype = gain->dtype;
    p.shift_dtype = shift->dtype;
    p.norm_eps = static_cast<float>(norm_eps);
    p.affine = affine.data();
  }
  if (weight) {
    p.weight = weight->data<float>();
    p.weight_run = weight->stride(0);
    p.weight_row = weight->stride(-1);
  }
  p.per_mask = reduction == "mask";
  p.row_loss = row_loss.data();
  p.loss = loss.data<float>();
  p.unit = with_grad ? unit.data() : nullptr;
  p.threads = torch_threads();
  {
    py::gil_scoped_release nogil;
    latent_loss_forward_cpu(p);
  }
  return {loss, unit};
}

static Tensor backward_cpu(const Tensor& grad, const Tensor& unit, bool half) {
  const DType type = half ? DType::f16 : unit.dtype;
  Tensor dpred = unit.dim() == 3 ? unit.new_empty({unit.size(0), unit.size(1), unit.size(2)}, type)
                                 : unit.new_empty({unit.size(0), unit.size(1)}, type);
  const LatentLossBackwardParams params{unit.data(), grad.data<float>(), dpred.data(), unit.numel(),
                                        type,        torch_threads()};
  py::gil_scoped_release nogil;
  latent_loss_backward_cpu(params);
  return dpred;
}

} // namespace latent_loss_bindings

void bind_latent_loss(py::module_& m) {
  using namespace latent_loss_bindings;
  m.def("latent_loss_forward_cpu", &forward_cpu);
  m.def("latent_loss_backward_cpu", &backward_cpu);
}

} // namespace jepa
