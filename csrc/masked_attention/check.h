// What memory depends on. The public function has checked all of it; the torch op can be called without.
#pragma once
#include <stdexcept>
#include <string>

#include "common/tensor.h"

namespace jepa {

inline void require(bool holds, const char* what) {
  if (!holds)
    throw std::invalid_argument(std::string("masked_attention: ") + what + "; call the public function");
}

// q, k and v, packed or dense, with as many sequences of keys as of queries.
inline void check_rows(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cu,
                       const std::optional<Tensor>& k_cu) {
  const bool packed = cu.has_value();
  require(q.dim() == (packed ? 3 : 4) && k.dim() == q.dim() && v.dim() == q.dim(),
          "q, k and v must have 3 dimensions with cu_seqlens, 4 without");
  require(k_cu.has_value() == packed, "cu_seqlens and k_cu_seqlens must be given together");
  require(!packed || cu->size(0) == k_cu->size(0), "cu_seqlens and k_cu_seqlens must have one length");
  require(packed || q.size(0) == k.size(0), "q and k must hold as many sequences");
  for (int i = 0; i < k.dim(); ++i) require(k.size(i) == v.size(i), "v must have k's shape");
  require(q.size(-1) == k.size(-1) && q.size(-1) % 8 == 0 && q.size(-1) > 0 && q.size(-1) <= 128,
          "q and k must have one head dim, a multiple of 8 up to 128");
  require(k.size(1) ? q.size(1) % k.size(1) == 0 : q.size(1) == 0, "k's heads must divide q's");
  require(q.dtype == k.dtype && q.dtype == v.dtype, "q, k and v must have one dtype");
}

// What backward gets of forward's outputs: the gradient of one, and lse.
inline void check_outputs(const Tensor& grad, const Tensor& lse, const Tensor& q) {
  const int tokens = q.dim() == 3 ? 0 : 2;
  require(grad.dim() == q.dim() && grad.dtype == q.dtype, "grad and out must have q's shape and dtype");
  for (int i = 0; i < q.dim(); ++i)
    require(grad.size(i) == q.size(i), "grad and out must have q's shape and dtype");
  require(lse.dim() == q.dim() - 1 && lse.dtype == DType::f32 && lse.size(-1) == q.size(tokens) &&
              lse.size(-2) == q.size(1) && (tokens == 0 || lse.size(0) == q.size(0)),
          "lse must be what forward gave");
}

// A table with a row for each of x's tokens, of `trailing` dimensions.
inline void check_table(const std::optional<Tensor>& table, const Tensor& x, DType type, int trailing) {
  if (!table) return;
  const bool packed = x.dim() == 3;
  const int tokens = table->dim() - trailing - 1;
  require(table->dtype == type && table->dim() == trailing + (packed ? 1 : 2),
          "a table must have its dtype and rank");
  require(table->size(tokens) == x.size(packed ? 0 : 2), "a table must have a row for every token");
  require(packed || table->size(0) == x.size(0), "a table must have every sequence");
  require(table->stride(-1) == 1, "a table's last dimension must be contiguous");
}

inline void check_turns(const std::optional<Tensor>& turns, const Tensor& x) {
  check_table(turns, x, DType::f32, 2);
  if (!turns) return;
  require(turns->size(-2) == 2 && turns->size(-1) <= x.size(-1) && turns->size(-1) % 2 == 0 &&
              turns->stride(-2) == turns->size(-1),
          "turns must hold the cosine and sine of an even number of channels");
}

inline void check_ranges(const std::optional<Tensor>& ranges, const Tensor& q) {
  check_table(ranges, q, DType::i32, 1);
  require(!ranges || ranges->size(-1) == 2, "key_ranges must hold a beginning and an end");
}

} // namespace jepa
