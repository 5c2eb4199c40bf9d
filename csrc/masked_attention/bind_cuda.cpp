#if JEPA_CUDA
#include "masked_attention/arguments.h"
#include "masked_attention/check.h"

#include <tuple>

namespace jepa {
namespace masked_attention_cuda_bindings {

static AttentionInput input_of(const Tensor& x) {
  const bool packed = x.dim() == 3;
  return {rows_of(x), packed ? 1 : x.size(0), packed ? x.size(0) : x.size(2)};
}

static bool strides_fit(const Tensor& x) {
  bool fits = x.stride(-1) == 1;
  for (int i = 0; i + 1 < x.dim(); ++i) fits &= x.size(i) == 1 || (x.stride(i) > 0 && x.stride(i) % 8 == 0);
  return fits || x.numel() == 0;
}

static bool mappable(const Tensor& x) {
  return strides_fit(x) && reinterpret_cast<uintptr_t>(x.data()) % 16 == 0;
}

// x, or a copy of what no tensor map describes: an expanded gradient (of a sum), and a tensor that begins
// anywhere, in compiled code, which chooses the backend without seeing where.
static Tensor mapped(const Tensor& x) {
  if (mappable(x)) return x;
  const Tensor copy = empty_like(x);
  copy.obj.attr("copy_")(x.obj);
  return copy;
}

static bool is_starts(const Tensor& x) {
  return x.dtype == DType::i32 && x.dim() == 1 && x.size(0) > 0 && (x.stride(0) == 1 || x.size(0) == 1);
}

struct Inputs {
  Tensor q, k, v; // alive until the launch
};

static Inputs checked(const Tensor& q, const Tensor& k, const Tensor& v, const py::args& rest) {
  const auto cu = rest[0].cast<std::optional<Tensor>>(), k_cu = rest[1].cast<std::optional<Tensor>>();
  check_rows(q, k, v, cu, k_cu);
  require(!cu || (is_starts(*cu) && is_starts(*k_cu)), "cu_seqlens must be int32 [S + 1], contiguous");
  require(rest[4].cast<int64_t>() <= 256 && rest[5].cast<int64_t>() <= 256,
          "sequences must have at most 256 queries and keys");
  require(rest[6].cast<int64_t>() == 0 && rest[7].is_none() && rest[8].is_none(),
          "frame_size, key_ranges and turns must not be given");
  require(strides_fit(q) && strides_fit(k) && strides_fit(v),
          "q, k and v must be in rows of stride 1 at strides of multiples of 16 bytes");
  return {mapped(q), mapped(k), mapped(v)};
}

static MaskedAttentionCudaParams params_of(const Inputs& inputs, const py::args& rest) {
  const auto& [q, k, v] = inputs;
  const auto cu_seqlens = rest[0].cast<std::optional<Tensor>>(),
             k_cu_seqlens = rest[1].cast<std::optional<Tensor>>();
  MaskedAttentionCudaParams p{};
  p.q = input_of(q);
  p.k = input_of(k);
  p.v = input_of(v);
  if (cu_seqlens) {
    p.shape.cu_seqlens = cu_seqlens->data<int32_t>();
    p.shape.k_cu_seqlens = k_cu_seqlens->data<int32_t>();
    p.sequences = cu_seqlens->size(0) - 1;
  } else {
    p.sequences = q.size(0);
    p.shape.queries = q.size(2);
    p.shape.keys = k.size(2);
  }
  p.shape.most_queries = rest[4].cast<int64_t>();
  p.shape.most_keys = rest[5].cast<int64_t>();
  p.shape.heads = q.size(1);
  p.shape.key_heads = k.size(1);
  p.shape.width = q.size(-1);
  p.shape.scale = rest[11].cast<float>();
  p.shape.dtype = q.dtype;
  p.device = q.device;
  p.stream = q.stream();
  return p;
}

static std::tuple<Tensor, Tensor> forward_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                               const py::args& rest) {
  const Inputs inputs = checked(q, k, v, rest);
  MaskedAttentionCudaParams p = params_of(inputs, rest);
  const Tensor out = empty_like(q), lse = empty_lse(q);
  p.out = rows_of(out);
  p.lse = lse_rows_of(lse);
  {
    py::gil_scoped_release nogil;
    masked_attention_forward_cuda(p);
  }
  return {out, lse};
}

static std::vector<Tensor> backward_cuda(const Tensor& grad, const Tensor& q, const Tensor& k,
                                         const Tensor& v, const Tensor& out, const Tensor& lse,
                                         const py::args& rest) {
  const Inputs inputs = checked(q, k, v, rest);
  MaskedAttentionCudaParams p = params_of(inputs, rest);
  check_outputs(grad, lse, q);
  check_outputs(out, lse, q);
  require(mappable(out) && (lse.stride(-1) == 1 || lse.size(-1) <= 1),
          "out and lse must be what forward gave");
  const Tensor grad_rows = mapped(grad);
  AttentionRows rows[3];
  const std::vector<Tensor> grads = empty_grads(q, k, v, rest[12].cast<bool>(), rows);
  p.out = rows_of(out);
  p.lse = lse_rows_of(lse);
  p.grad = input_of(grad_rows);
  p.dq = rows[0];
  p.dk = rows[1];
  p.dv = rows[2];
  {
    py::gil_scoped_release nogil;
    masked_attention_backward_cuda(p);
  }
  return grads;
}

} // namespace masked_attention_cuda_bindings

void bind_masked_attention_cuda(py::module_& m) {
  using namespace masked_attention_cuda_bindings;
  m.def("masked_attention_forward_cuda", &forward_cuda);
  m.def("masked_attention_backward_cuda", &backward_cuda);
}

} // namespace jepa
#endif
