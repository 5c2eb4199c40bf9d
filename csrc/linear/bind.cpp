#include "linear/linear.h"

#include "common/tensor.h"

namespace jepa {
namespace linear_bindings {

using namespace linear;

struct Matrix {
  Tensor held;
  int64_t rows, columns, row_stride, column_stride;

  const float* data() const { return held.data<float>(); }
  LinearOperand by_row() const { return {data(), row_stride, column_stride}; }
  LinearOperand by_column() const { return {data(), column_stride, row_stride}; }
};

static int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int i = 0; i < x.dim() - 1; ++i) rows *= x.size(i);
  return rows;
}

// A tensor [..., columns] as a matrix; one whose leading axes don't follow one another is copied.
static Matrix matrix(const Tensor& x) {
  const int64_t columns = x.size(-1);
  if (x.numel() == 0) return {x, rows_of(x), columns, 0, x.stride(-1)};
  int64_t rows = 1, stride = 0;
  for (int i = x.dim() - 2; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (rows == 1)
      stride = x.stride(i);
    else if (x.stride(i) != rows * stride)
      return matrix(Tensor::from(x.obj.attr("contiguous")()));
    rows *= x.size(i);
  }
  return {x, rows, columns, stride, x.stride(-1)};
}

static void multiply(const LinearOperand& left, const LinearOperand& right, int64_t rows, int64_t columns,
                     int64_t depth, const std::optional<Tensor>& bias, const Tensor& out) {
  const int64_t chunk = std::min(depth, CHUNK), whole = (columns + MAX_COLUMNS - 1) / MAX_COLUMNS;
  const int threads =
      static_cast<int>(std::min<int64_t>(torch_threads(), std::max<int64_t>(rows / LEAST_ROWS, 1)));
  const Tensor panels = out.new_empty({whole * MAX_COLUMNS * chunk});
  const Tensor scratch = out.new_empty({threads * TILE_ROWS * chunk});
  const LinearMultiplyParams params{left,
                                    right,
                                    bias ? bias->data<float>() : nullptr,
                                    bias ? bias->stride(0) : 0,
                                    rows,
                                    columns,
                                    depth,
                                    panels.data<float>(),
                                    scratch.data<float>(),
                                    out.data<float>(),
                                    threads};
  py::gil_scoped_release nogil;
  linear_multiply_cpu(params);
}

static Tensor forward_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Matrix rows = matrix(x), layer = matrix(weight);
  std::vector<int64_t> shape = x.shape();
  shape.back() = layer.rows;
  const Tensor out = x.new_empty(shape);
  multiply(rows.by_row(), layer.by_row(), rows.rows, layer.rows, rows.columns, bias, out);
  return out;
}

static std::array<Tensor, 3> backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                          std::array<bool, 3> wanted) {
  const Matrix slopes = matrix(grad), rows = matrix(x), layer = matrix(weight);
  const auto none = [&] { return grad.new_empty({0}); }; // a new one each time: outputs must not alias
  const std::array<Tensor, 3> found{wanted[0] ? grad.new_empty(x.shape()) : none(),
                                    wanted[1] ? grad.new_empty(weight.shape()) : none(),
                                    wanted[2] ? grad.new_empty({layer.rows}) : none()};
  const int64_t tokens = rows.rows, outputs = layer.rows, inputs = layer.columns;
  if (wanted[0]) multiply(slopes.by_row(), layer.by_column(), tokens, inputs, outputs, {}, found[0]);
  if (wanted[1]) multiply(slopes.by_column(), rows.by_column(), outputs, inputs, tokens, {}, found[1]);
  if (wanted[2]) {
    const LinearSumParams params{slopes.data(), slopes.row_stride,      slopes.column_stride, tokens,
                                 outputs,       found[2].data<float>(), torch_threads()};
    py::gil_scoped_release nogil;
    linear_sum_cpu(params);
  }
  return found;
}

} // namespace linear_bindings

void bind_linear(py::module_& m) {
  using namespace linear_bindings;
  m.def("linear_forward_cpu", &forward_cpu);
  m.def("linear_backward_cpu", &backward_cpu);
}

} // namespace jepa
