#include "masked_attention/arguments.h"
#include "masked_attention/check.h"
#include "masked_attention/schedule.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>

namespace jepa {
namespace masked_attention_bindings {

static AttentionTurns turns_of(const std::optional<Tensor>& x, bool half) {
  if (!x) return {};
  const bool packed = x->dim() == 3;
  return {x->data<float>(), packed ? 0 : x->stride(0), x->stride(-3), x->size(-1), half};
}

static AttentionRanges ranges_of(const std::optional<Tensor>& x) {
  if (!x) return {};
  return {x->data<int32_t>(), x->dim() == 2 ? 0 : x->stride(0), x->stride(-2)};
}

// What forward and backward take alike, as the torch ops list it. The schedules of tiles are for GPUs.
struct Options {
  std::optional<Tensor> cu_seqlens, k_cu_seqlens;
  int64_t frame_size;
  std::optional<Tensor> key_ranges, turns, k_turns;
  bool half;
  float scale;

  explicit Options(const py::args& a)
      : cu_seqlens(tensor(a[0])), k_cu_seqlens(tensor(a[1])), frame_size(a[6].cast<int64_t>()),
        key_ranges(tensor(a[7])), turns(tensor(a[8])), k_turns(tensor(a[9])), half(a[10].cast<bool>()),
        scale(a[11].cast<float>()) {}
  static std::optional<Tensor> tensor(py::handle x) { return x.cast<std::optional<Tensor>>(); }
};

static void check(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options) {
  check_rows(q, k, v, options.cu_seqlens, options.k_cu_seqlens);
  check_ranges(options.key_ranges, q);
  check_turns(options.turns, q);
  check_turns(options.k_turns, k);
  require(options.turns.has_value() == options.k_turns.has_value(),
          "turns and k_turns must be given together");
}

// The sequences of a call.
struct Call {
  AttentionShape shape{};
  Runs query_runs, key_runs;
  int64_t sequences;

  Call(const Tensor& q, const Tensor& k, const Options& options)
      : query_runs(options.cu_seqlens, q.size(0)), key_runs(options.k_cu_seqlens, k.size(0)) {
    const bool dense = q.dim() == 4;
    shape.cu_seqlens = query_runs.starts();
    shape.k_cu_seqlens = key_runs.starts();
    shape.queries = dense ? q.size(2) : 0;
    shape.keys = dense ? k.size(2) : 0;
    shape.heads = q.size(1);
    shape.key_heads = k.size(1);
    shape.width = q.size(-1);
    shape.frame_size = options.frame_size;
    shape.ranges = ranges_of(options.key_ranges);
    shape.turns = turns_of(options.turns, options.half);
    shape.k_turns = turns_of(options.k_turns, options.half);
    shape.scale = options.scale;
    shape.dtype = q.dtype;
    shape.threads = torch_threads();
    sequences = dense ? q.size(0) : query_runs.count();
  }
};

// Rows past the last sequence of a packed axis.
static void clear_unused(const Tensor& x, const Runs& runs) {
  if (!runs.starts() || x.numel() == 0) return;
  const int64_t used = runs.starts()[runs.count()], row = x.numel() / x.size(0);
  const int64_t size = x.dtype == DType::f32 ? 4 : 2;
  std::memset(x.data<char>() + used * row * size, 0, (x.size(0) - used) * row * size);
}

static void hide_unused(const Tensor& lse, const Runs& runs) {
  if (!runs.starts()) return;
  const int64_t used = runs.starts()[runs.count()], rows = lse.size(1);
  for (int64_t h = 0; h < lse.size(0); ++h)
    std::fill(lse.data<float>() + h * rows + used, lse.data<float>() + (h + 1) * rows,
              -std::numeric_limits<float>::infinity());
}

// q [B, H, N, D], k and v [B, Hk, M, D]; or q [T, H, D], k and v [Tk, Hk, D] with cu_seqlens.
static std::tuple<Tensor, Tensor> forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const py::args& rest) {
  const Options options(rest);
  check(q, k, v, options);
  Call call(q, k, options);
  std::vector<AttentionTask> tasks;
  schedule_attention_forward(call.shape, call.sequences, tasks);
  const Tensor out = empty_like(q), lse = empty_lse(q);
  const MaskedAttentionForwardParams params{call.shape, rows_of(q),   rows_of(k),
                                            rows_of(v), rows_of(out), lse_rows_of(lse)};
  {
    py::gil_scoped_release nogil;
    clear_unused(out, call.query_runs);
    hide_unused(lse, call.query_runs);
    masked_attention_forward_cpu(params);
  }
  return {out, lse};
}

static std::vector<Tensor> backward_cpu(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                        py::handle, const Tensor& lse, const py::args& rest) {
  const Options options(rest);
  check(q, k, v, options);
  Call call(q, k, options);
  AttentionBackwardTasks tasks;
  schedule_attention_backward(call.shape, call.sequences, tasks);
  check_outputs(grad, lse, q);
  AttentionRows rows[3];
  const std::vector<Tensor> grads = empty_grads(q, k, v, rest[12].cast<bool>(), rows);
  const int64_t one = tasks.query_parts.empty() ? 0 : q.numel() / q.size(-1);
  const int64_t rows_of_head = q.dim() == 3 ? q.size(0) : q.size(2);
  std::vector<float> stats(3 * one); // [3, heads, T], or [3, B, heads, N]
  const MaskedAttentionBackwardParams params{
      call.shape,
      rows_of(grad),
      rows_of(q),
      rows_of(k),
      rows_of(v),
      rows[0],
      rows[1],
      rows[2],
      tasks.query_parts.data(),
      tasks.key_parts.data(),
      static_cast<int64_t>(tasks.query_parts.size()),
      static_cast<int64_t>(tasks.key_parts.size()),
      tasks.most_whole_keys,
      {stats.data(), q.dim() == 3 ? 0 : q.size(1) * rows_of_head, 1, rows_of_head, one}};
  {
    py::gil_scoped_release nogil;
    for (const Tensor& x : grads) clear_unused(x, &x == &grads[0] ? call.query_runs : call.key_runs);
    masked_attention_backward_cpu(params);
  }
  return grads;
}

} // namespace masked_attention_bindings

void bind_masked_attention(py::module_& m) {
  using namespace masked_attention_bindings;
  m.def("masked_attention_forward_cpu", &forward_cpu);
  m.def("masked_attention_backward_cpu", &backward_cpu);
#if JEPA_CUDA
  bind_masked_attention_cuda(m);
#endif
}

} // namespace jepa
