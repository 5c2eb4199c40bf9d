// pybind11 face of info_nce. Python: _C.info_nce_forward_cpu(...) -> log-sum-exps, pairs and sums;
// _C.info_nce_backward_cpu(...) -> dx, dy, dtemperature
#include "info_nce/info_nce.h"

#include <tuple>

#include "common/tensor.h"

namespace jepa {
namespace info_nce_bindings {

static info_nce::Side side_of(const Tensor& x, const std::optional<Tensor>& items) {
  return {x.data(), x.size(0), x.stride(0), x.stride(1), x.dtype, items ? items->data<float>() : nullptr};
}

// A tensor, so that its memory is counted, and taken over, as that of outputs is.
static Tensor workspace_of(const Tensor& x, const Tensor& y, int threads, bool backward) {
  const auto space = info_nce::workspace(x.size(0), y.size(0), x.size(1), threads, backward);
  return x.new_empty({space.size}, DType::f32);
}

// x [B, E], y [C, E]; sums are empty without label smoothing.
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
forward_cpu(const Tensor& x, const Tensor& y, const Tensor& temperature, const std::optional<Tensor>& items,
            const std::optional<Tensor>& column_items, int64_t shift, double label_smoothing,
            bool normalize) {
  const int64_t rows = x.size(0), columns = y.size(0);
  const bool sums = label_smoothing > 0;
  const int threads = torch_threads();
  const Tensor space = workspace_of(x, y, threads, false);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> out{
      x.new_empty({rows}, DType::f64), x.new_empty({columns}, DType::f64), x.new_zeros({rows}, DType::f32),
      x.new_empty({sums ? rows : 0}, DType::f64), x.new_empty({sums ? columns : 0}, DType::f64)};
  const InfoNceForwardParams p{side_of(x, items),
                               side_of(y, column_items),
                               x.size(1),
                               shift,
                               *temperature.data<double>(),
                               normalize,
                               std::get<0>(out).data<double>(),
                               std::get<1>(out).data<double>(),
                               std::get<2>(out).data<float>(),
                               sums ? std::get<3>(out).data<double>() : nullptr,
                               sums ? std::get<4>(out).data<double>() : nullptr,
                               space.data<float>(),
                               threads};
  {
    py::gil_scoped_release nogil;
    info_nce_forward_cpu(p);
  }
  return out;
}

static std::tuple<Tensor, Tensor, Tensor>
backward_cpu(const Tensor& weight, const Tensor& x, const Tensor& y, const Tensor& temperature,
             const std::optional<Tensor>& items, const std::optional<Tensor>& column_items,
             const Tensor& row_lse, const Tensor& col_lse, const std::optional<Tensor>& row_share,
             const std::optional<Tensor>& col_share, int64_t shift, double kept, bool normalize, bool wide) {
  const int64_t rows = x.size(0), columns = y.size(0), channels = x.size(1);
  const int threads = torch_threads();
  const Tensor space = workspace_of(x, y, threads, true);
  const DType x_type = wide ? DType::f32 : x.dtype, y_type = wide ? DType::f32 : y.dtype;
  const bool in_place = x_type == DType::f32 && channels % info_nce::WIDEST == 0;
  const int64_t row = in_place ? channels : info_nce::width_of(channels);
  const Tensor accumulated = x.new_zeros({rows, row}, DType::f32);
  const Tensor dx = in_place ? accumulated : x.new_empty({rows, channels}, x_type);
  const Tensor dy = y.new_empty({columns, channels}, y_type), dtemperature = x.new_empty({}, DType::f64);
  const InfoNceBackwardParams p{side_of(x, items),
                                side_of(y, column_items),
                                channels,
                                shift,
                                *temperature.data<double>(),
                                normalize,
                                row_lse.data<double>(),
                                col_lse.data<double>(),
                                row_share ? row_share->data<float>() : nullptr,
                                col_share ? col_share->data<float>() : nullptr,
                                kept,
                                *weight.data<float>(),
                                dx.data(),
                                dy.data(),
                                wide,
                                accumulated.data<float>(),
                                row,
                                dtemperature.data<double>(),
                                space.data<float>(),
                                threads};
  {
    py::gil_scoped_release nogil;
    info_nce_backward_cpu(p);
  }
  return {dx, dy, dtemperature};
}

} // namespace info_nce_bindings

void bind_info_nce(py::module_& m) {
  using namespace info_nce_bindings;
  m.def("info_nce_forward_cpu", &forward_cpu);
  m.def("info_nce_backward_cpu", &backward_cpu);
}

} // namespace jepa
