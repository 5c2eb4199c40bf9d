#if JEPA_CUDA
#include "masked_attention/arguments.h"
#include "masked_attention/check.h"

#include <tuple>

namespace jepa {

static AttentionInput input_of(const Tensor& x) {
  const bool packed = x.dim() == 3;
  return {rows_of(x), packed ? 1 : x.size(0), packed ? x.size(0) : x.size(2)};
}

static bool mappable(const Tensor& x) {
  bool fits = x.stride(-1) == 1 && reinterpret_cast<uintptr_t>(x.data()) % 16 == 0;
  for (int i = 0; i + 1 < x.dim(); ++i) fits &= x.size(i) == 1 || (x.stride(i) > 0 && x.stride(i) % 8 == 0);
  return fits || x.numel() == 0;
}

static void check(const Tensor& q, const Tensor& k, const Tensor& v, const py::args& rest) {
  check_rows(q, k, v, rest[0].cast<std::optional<Tensor>>(), rest[1].cast<std::optional<Tensor>>());
  require(rest[4].cast<int64_t>() <= 256 && rest[5].cast<int64_t>() <= 256,
          "sequences must have at most 256 queries and keys");
  require(rest[6].cast<int64_t>() == 0 && rest[7].is_none() && rest[8].is_none(),
          "frame_size, key_ranges and turns must not be given");
  require(mappable(q) && mappable(k) && mappable(v),
          "q, k and v must be in rows of stride 1 that begin at multiples of 16 bytes");
}

static MaskedAttentionCudaParams params_of(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const py::args& rest) {
  const auto cu_seqlens = rest[0].cast<std::optional<Tensor>>(),
             k_cu_seqlens = rest[1].cast<std::optional<Tensor>>();
  check(q, k, v, rest);
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
  p.device = q.device_index();
  p.stream = q.stream();
  return p;
}

static std::tuple<Tensor, Tensor> forward_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                               const py::args& rest) {
  MaskedAttentionCudaParams p = params_of(q, k, v, rest);
  const Tensor out = empty_like(q), lse = empty_lse(q);
  p.out = rows_of(out);
  p.lse = lse_rows_of(lse);
  masked_attention_forward_cuda(p);
  return {out, lse};
}

static std::vector<Tensor> backward_cuda(const Tensor& grad, const Tensor& q, const Tensor& k,
                                         const Tensor& v, const Tensor& out, const Tensor& lse,
                                         const py::args& rest) {
  MaskedAttentionCudaParams p = params_of(q, k, v, rest);
  for (int i = 0; i < q.dim(); ++i)
    require(grad.size(i) == q.size(i) && out.size(i) == q.size(i), "grad and out must have q's shape");
  require(lse.dim() == q.dim() - 1 && mappable(out), "out and lse must be what forward gave");
  // Expanded gradients (of a sum) are written out.
  const Tensor mapped = mappable(grad) ? grad : Tensor::from(grad.obj.attr("contiguous")());
  AttentionRows rows[3];
  const std::vector<Tensor> grads = empty_grads(q, k, v, rest[12].cast<bool>(), rows);
  p.out = rows_of(out);
  p.lse = lse_rows_of(lse);
  p.grad = input_of(mapped);
  p.dq = rows[0];
  p.dk = rows[1];
  p.dv = rows[2];
  masked_attention_backward_cuda(p);
  return grads;
}

void bind_masked_attention_cuda(py::module_& m) {
  m.def("masked_attention_forward_cuda", &forward_cuda);
  m.def("masked_attention_backward_cuda", &backward_cuda);
}

} // namespace jepa
#endif
