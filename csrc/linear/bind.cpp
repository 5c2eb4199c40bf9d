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

static Tensor contiguous(const Tensor& x) { return Tensor::from(x.obj.attr("contiguous")()); }

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
      return matrix(contiguous(x));
    rows *= x.size(i);
  }
  return {x, rows, columns, stride, x.stride(-1)};
}

static LinearMultiplyParams params_of(const LinearOperand& left, const LinearOperand& right, int64_t rows,
                                      int64_t columns, int64_t depth) {
  LinearMultiplyParams p{};
  p.left = left, p.right = right;
  p.rows = rows, p.columns = columns, p.depth = depth;
  return p;
}

// Workspace and threads are still to be set in `p`.
static void multiply(LinearMultiplyParams p, const Tensor& out) {
  const int64_t chunk = std::min(p.depth, CHUNK), whole = (p.columns + MAX_COLUMNS - 1) / MAX_COLUMNS;
  p.threads = static_cast<int>(std::min<int64_t>(torch_threads(), std::max<int64_t>(p.rows / LEAST_ROWS, 1)));
  const Tensor panels = out.new_empty({whole * MAX_COLUMNS * chunk});
  const Tensor scratch = out.new_empty({p.threads * TILE_ROWS * chunk});
  p.panels = panels.data<float>();
  p.scratch = scratch.data<float>();
  p.out = out.data<float>();
  py::gil_scoped_release nogil;
  linear_multiply_cpu(p);
}

static std::array<Tensor, 2> forward_cpu(const Tensor& x, const Tensor& weight,
                                         const std::optional<Tensor>& bias, bool gelu, bool keep) {
  const Matrix rows = matrix(x), layer = matrix(weight);
  std::vector<int64_t> shape = x.shape();
  shape.back() = layer.rows;
  keep = keep && gelu;
  const Tensor out = x.new_empty(shape), kept = keep ? x.new_empty(shape) : x.new_empty({0});
  LinearMultiplyParams p = params_of(rows.by_row(), layer.by_row(), rows.rows, layer.rows, rows.columns);
  p.bias = bias ? bias->data<float>() : nullptr;
  p.bias_stride = bias ? bias->stride(0) : 0;
  p.gelu = gelu;
  p.kept = keep ? kept.data<float>() : nullptr;
  multiply(p, out);
  return {out, kept};
}

// Sums of the rows of `grad` to `sums`; with `kept` what grad is before the GELU, to `slopes`, and its sums.
static void sum(const Matrix& grad, const std::optional<Tensor>& kept, const Tensor& slopes, float* sums) {
  LinearSumParams p{};
  p.x = grad.by_row();
  p.rows = grad.rows, p.columns = grad.columns;
  p.kept = kept ? kept->data<float>() : nullptr; // contiguous
  p.slopes = slopes.data<float>();
  p.out = sums;
  p.threads = torch_threads();
  py::gil_scoped_release nogil;
  linear_sum_cpu(p);
}

static std::array<Tensor, 3> backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                          const std::optional<Tensor>& kept, std::array<bool, 3> wanted) {
  const auto none = [&] { return grad.new_empty({0}); }; // a new one each time: outputs must not alias
  Matrix slopes = matrix(grad);
  const Matrix rows = matrix(x), layer = matrix(weight);
  const std::array<Tensor, 3> found{wanted[0] ? grad.new_empty(x.shape()) : none(),
                                    wanted[1] ? grad.new_empty(weight.shape()) : none(),
                                    wanted[2] ? grad.new_empty({layer.rows}) : none()};
  const int64_t tokens = rows.rows, outputs = layer.rows, inputs = layer.columns;
  if (kept || wanted[2]) {
    const Tensor before = kept ? grad.new_empty(grad.shape()) : none();
    sum(slopes, kept ? std::optional(contiguous(*kept)) : std::nullopt, before,
        wanted[2] ? found[2].data<float>() : nullptr);
    if (kept) slopes = matrix(before);
  }
  if (wanted[0]) multiply(params_of(slopes.by_row(), layer.by_column(), tokens, inputs, outputs), found[0]);
  if (wanted[1]) multiply(params_of(slopes.by_column(), rows.by_column(), outputs, inputs, tokens), found[1]);
  return found;
}

} // namespace linear_bindings

void bind_linear(py::module_& m) {
  using namespace linear_bindings;
  m.def("linear_forward_cpu", &forward_cpu);
  m.def("linear_backward_cpu", &backward_cpu);
}

} // namespace jepa
