#include "masked_attention/masked_attention.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "common/tensor.h"

namespace jepa {

constexpr int64_t TASK_QUERIES =
    240;                           // of one sequence and head: long sequences are shared out between threads
constexpr int64_t SMALL = 1 << 16; // multiply-adds that are not worth a second thread

static AttentionRows rows_of(const Tensor& x) {
  if (x.dim() == 3) return {x.data(), 0, x.stride(0), x.stride(1), x.stride(2)};
  return {x.data(), x.stride(0), x.stride(2), x.stride(1), x.stride(3)};
}

// [T, H, D], or [B, H, N, D] as a view of contiguous [B, N, H, D].
static Tensor empty_like(const Tensor& x) {
  if (x.dim() == 3) return x.new_empty({x.size(0), x.size(1), x.size(2)});
  const Tensor rows = x.new_empty({x.size(0), x.size(2), x.size(1), x.size(3)});
  return Tensor::from(rows.obj.attr("transpose")(1, 2));
}

// Rows past the last sequence of a packed axis.
static void clear_unused(const Tensor& x, const Runs& runs) {
  if (!runs.starts()) return;
  const int64_t used = runs.starts()[runs.count()], row = x.size(1) * x.size(2);
  const int64_t size = x.dtype == DType::f32 ? 4 : 2;
  std::memset(x.data<char>() + used * row * size, 0, (x.size(0) - used) * row * size);
}

// The shape, and its tasks: blocks of queries (`block` 0: whole sequences, those without queries too), the
// most work first.
struct Schedule {
  AttentionShape shape;
  std::vector<AttentionTask> tasks;
  Runs query_runs, key_runs;

  Schedule(const Tensor& q, const Tensor& k, const std::optional<Tensor>& cu,
           const std::optional<Tensor>& k_cu, double scale, int64_t block)
      : query_runs(cu, q.size(0)), key_runs(k_cu, k.size(0)) {
    const bool dense = q.dim() == 4;
    const int64_t sequences = dense ? q.size(0) : query_runs.count();
    shape.cu_seqlens = query_runs.starts();
    shape.k_cu_seqlens = key_runs.starts();
    shape.queries = dense ? q.size(2) : 0;
    shape.keys = dense ? k.size(2) : 0;
    shape.heads = q.size(1);
    shape.key_heads = k.size(1);
    shape.width = q.size(-1);
    shape.scale = static_cast<float>(scale);
    shape.dtype = q.dtype;
    int64_t products = 0;
    shape.longest_keys = 0;
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t queries = queries_of(s);
      products += queries * keys_of(s);
      shape.longest_keys = std::max(shape.longest_keys, keys_of(s));
      if (block == 0) tasks.push_back({s, 0, queries});
      for (int64_t i = 0; block && i < queries; i += block)
        tasks.push_back({s, i, std::min(block, queries - i)});
    }
    std::stable_sort(tasks.begin(), tasks.end(), [this](const AttentionTask& a, const AttentionTask& b) {
      return a.count * keys_of(a.sequence) > b.count * keys_of(b.sequence);
    });
    shape.tasks = tasks.data();
    shape.task_count = static_cast<int64_t>(tasks.size());
    shape.threads = products * shape.heads * shape.width < SMALL ? 1 : torch_threads();
  }
  int64_t queries_of(int64_t s) const { return shape.cu_seqlens ? query_runs.length(s) : shape.queries; }
  int64_t keys_of(int64_t s) const { return shape.k_cu_seqlens ? key_runs.length(s) : shape.keys; }
};

// q [B, H, N, D], k and v [B, Hk, M, D]; or q [T, H, D], k and v [Tk, Hk, D] with cu and k_cu.
static Tensor forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cu,
                          const std::optional<Tensor>& k_cu, double scale) {
  const Schedule schedule(q, k, cu, k_cu, scale, TASK_QUERIES);
  const Tensor out = empty_like(q);
  const MaskedAttentionForwardParams params{schedule.shape, rows_of(q), rows_of(k), rows_of(v), rows_of(out)};
  py::gil_scoped_release nogil;
  clear_unused(out, schedule.query_runs);
  masked_attention_forward_cpu(params);
  return out;
}

static std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                       const Tensor& v, const std::optional<Tensor>& cu,
                                                       const std::optional<Tensor>& k_cu, double scale) {
  const Schedule schedule(q, k, cu, k_cu, scale, 0);
  const Tensor dq = empty_like(q), dk = empty_like(k), dv = empty_like(v);
  const MaskedAttentionBackwardParams params{schedule.shape, rows_of(grad), rows_of(q),  rows_of(k),
                                             rows_of(v),     rows_of(dq),   rows_of(dk), rows_of(dv)};
  {
    py::gil_scoped_release nogil;
    clear_unused(dq, schedule.query_runs);
    clear_unused(dk, schedule.key_runs);
    clear_unused(dv, schedule.key_runs);
    masked_attention_backward_cpu(params);
  }
  return {dq, dk, dv};
}

void bind_masked_attention(py::module_& m) {
  m.def("masked_attention_forward_cpu", &forward_cpu);
  m.def("masked_attention_backward_cpu", &backward_cpu);
}

} // namespace jepa
