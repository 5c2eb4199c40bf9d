// Arguments and results of the torch ops, as every backend reads and lays them out.
#pragma once
#include <vector>

#include "common/tensor.h"
#include "masked_attention/masked_attention.h"

namespace jepa {

inline AttentionRows rows_of(const Tensor& x) {
  if (x.dim() == 3) return {x.data(), 0, x.stride(0), x.stride(1), x.stride(2)};
  return {x.data(), x.stride(0), x.stride(2), x.stride(1), x.stride(3)};
}

inline AttentionRows lse_rows_of(const Tensor& x) {
  return {x.data(), x.dim() == 2 ? 0 : x.stride(0), x.stride(-1), x.stride(-2), 0};
}

// [T, H, D], or [B, H, N, D] as a view of contiguous [B, N, H, D].
inline Tensor empty_like(const Tensor& x) {
  if (x.dim() == 3) return x.new_empty({x.size(0), x.size(1), x.size(2)});
  const Tensor rows = x.new_empty({x.size(0), x.size(2), x.size(1), x.size(3)});
  return Tensor::from(rows.obj.attr("transpose")(1, 2));
}

// [H, T], or [B, H, N].
inline Tensor empty_lse(const Tensor& q) {
  if (q.dim() == 3) return q.new_empty({q.size(1), q.size(0)}, DType::f32);
  return q.new_empty({q.size(0), q.size(1), q.size(2)}, DType::f32);
}

// One [T, 3, H, D] or [B, N, 3, H, D], and q's, k's and v's gradients in it.
inline Tensor stack_like(const Tensor& q, AttentionRows (&rows)[3]) {
  const bool packed = q.dim() == 3;
  const int64_t heads = q.size(1), width = q.size(-1), one = heads * width;
  const Tensor all = packed ? q.new_empty({q.size(0), 3, heads, width})
                            : q.new_empty({q.size(0), q.size(2), 3, heads, width});
  const int64_t size = q.dtype == DType::f32 ? 4 : 2;
  for (int64_t i = 0; i < 3; ++i)
    rows[i] = {all.data<char>() + i * one * size, packed ? 0 : all.stride(0), 3 * one, width, 1};
  return all;
}

// What a backward returns, and where in it the gradients of q, k and v go.
inline std::vector<Tensor> empty_grads(const Tensor& q, const Tensor& k, const Tensor& v, bool stacked,
                                       AttentionRows (&rows)[3]) {
  if (stacked) return {stack_like(q, rows)};
  const std::vector<Tensor> grads = {empty_like(q), empty_like(k), empty_like(v)};
  for (int i = 0; i < 3; ++i) rows[i] = rows_of(grads[i]);
  return grads;
}

void bind_masked_attention_cuda(py::module_& m);

} // namespace jepa
