#include "masked_attention/masked_attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "common/tensor.h"

namespace jepa {

constexpr int64_t BLOCK = 48; // the kernels' queries at a time
constexpr int64_t MOST = 6;   // such blocks of a task: what the second-level cache holds beside the keys
constexpr int64_t TASKS = 4;  // for each thread, at least, where there are so many blocks
constexpr int64_t KEYS = 256;
constexpr int64_t HEADS_WIDE = 128, HEADS_CACHED = 1 << 16;
constexpr int64_t SMALL = 1 << 16; // multiply-adds that are not worth a second thread

static AttentionRows rows_of(const Tensor& x) {
  if (x.dim() == 3) return {x.data(), 0, x.stride(0), x.stride(1), x.stride(2)};
  return {x.data(), x.stride(0), x.stride(2), x.stride(1), x.stride(3)};
}

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

// The shape, and its tasks: blocks of queries, or whole sequences (those without queries too), the most work
// first.
struct Schedule {
  AttentionShape shape{};
  std::vector<AttentionTask> tasks;
  Runs query_runs, key_runs;

  Schedule(const Tensor& q, const Tensor& k, const Options& options, bool whole)
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
    const int64_t sequences = dense ? q.size(0) : query_runs.count();
    int64_t products = 0;
    for (int64_t s = 0; s < sequences; ++s) products += queries_of(s) * keys_of(s);
    shape.threads = products * shape.heads * shape.width < SMALL ? 1 : torch_threads();
    add_tasks(sequences, whole);
    shape.head_step = head_step(whole);
  }

private:
  int64_t queries_of(int64_t s) const { return shape.cu_seqlens ? query_runs.length(s) : shape.queries; }
  int64_t keys_of(int64_t s) const { return shape.k_cu_seqlens ? key_runs.length(s) : shape.keys; }

  int64_t work(const AttentionTask& t) const {
    const int64_t keys = keys_of(t.sequence), last = t.first + t.count - 1;
    const int64_t position = keys - queries_of(t.sequence) + last;
    return t.count * (shape.frame_size ? frame_end(position, shape.frame_size, keys) : keys);
  }

  void add_tasks(int64_t sequences, bool whole) {
    const int64_t block = whole ? std::numeric_limits<int64_t>::max() : block_of(sequences);
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t queries = queries_of(s);
      shape.most_keys = std::max(shape.most_keys, keys_of(s));
      shape.most_queries = std::max(shape.most_queries, std::min(block, queries));
      if (whole) tasks.push_back({s, 0, queries});
      for (int64_t i = 0; !whole && i < queries; i += block)
        tasks.push_back({s, i, std::min(block, queries - i)});
    }
    std::stable_sort(tasks.begin(), tasks.end(),
                     [this](const AttentionTask& a, const AttentionTask& b) { return work(a) > work(b); });
    shape.tasks = tasks.data();
    shape.task_count = static_cast<int64_t>(tasks.size());
  }

  // Heads side by side share cache lines and pages.
  int64_t head_step(bool whole) const {
    if (shape.key_heads == 0) return 1;
    const int64_t rows = whole ? 4 * shape.most_keys : 2 * std::min(shape.most_keys, KEYS);
    const int64_t cached = HEADS_CACHED / std::max<int64_t>(1, rows * shape.width);
    const int64_t fair = shape.task_count * shape.key_heads / (TASKS * shape.threads);
    return std::max<int64_t>(1, std::min({HEADS_WIDE / shape.width, cached, fair}));
  }

  // Queries of a task. No result depends on it: a block of queries is computed alike in any task.
  int64_t block_of(int64_t sequences) const {
    if (shape.key_heads == 0) return BLOCK;
    int64_t blocks = 0;
    for (int64_t s = 0; s < sequences; ++s) blocks += (queries_of(s) + BLOCK - 1) / BLOCK;
    const int64_t fair = blocks * shape.heads / (TASKS * shape.threads);
    return BLOCK * std::max<int64_t>(1, std::min(MOST, fair) / (shape.heads / shape.key_heads));
  }
};

// [T, H, D], or [B, H, N, D] as a view of contiguous [B, N, H, D].
static Tensor empty_like(const Tensor& x) {
  if (x.dim() == 3) return x.new_empty({x.size(0), x.size(1), x.size(2)});
  const Tensor rows = x.new_empty({x.size(0), x.size(2), x.size(1), x.size(3)});
  return Tensor::from(rows.obj.attr("transpose")(1, 2));
}

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
  const Schedule schedule(q, k, options, false);
  const bool packed = q.dim() == 3;
  const Tensor out = empty_like(q);
  const Tensor lse = packed ? q.new_empty({q.size(1), q.size(0)}, DType::f32)
                            : q.new_empty({q.size(0), q.size(1), q.size(2)}, DType::f32);
  const AttentionRows lse_rows = {lse.data(), packed ? 0 : lse.stride(0), 1, lse.stride(-2), 0};
  const MaskedAttentionForwardParams params{schedule.shape, rows_of(q),   rows_of(k),
                                            rows_of(v),     rows_of(out), lse_rows};
  {
    py::gil_scoped_release nogil;
    clear_unused(out, schedule.query_runs);
    hide_unused(lse, schedule.query_runs);
    masked_attention_forward_cpu(params);
  }
  return {out, lse};
}

// One [T, 3, H, D] or [B, N, 3, H, D], and q's, k's and v's gradients in it.
static Tensor stack_like(const Tensor& q, AttentionRows (&rows)[3]) {
  const bool packed = q.dim() == 3;
  const int64_t heads = q.size(1), width = q.size(-1), one = heads * width;
  const Tensor all = packed ? q.new_empty({q.size(0), 3, heads, width})
                            : q.new_empty({q.size(0), q.size(2), 3, heads, width});
  const int64_t size = q.dtype == DType::f32 ? 4 : 2;
  for (int64_t i = 0; i < 3; ++i)
    rows[i] = {all.data<char>() + i * one * size, packed ? 0 : all.stride(0), 3 * one, width, 1};
  return all;
}

static std::vector<Tensor> backward_cpu(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                        py::handle, py::handle, const py::args& rest) {
  const Options options(rest);
  const Schedule schedule(q, k, options, true);
  AttentionRows rows[3];
  std::vector<Tensor> grads;
  if (rest[12].cast<bool>()) {
    grads = {stack_like(q, rows)};
  } else {
    grads = {empty_like(q), empty_like(k), empty_like(v)};
    for (int i = 0; i < 3; ++i) rows[i] = rows_of(grads[i]);
  }
  const MaskedAttentionBackwardParams params{schedule.shape, rows_of(grad), rows_of(q), rows_of(k),
                                             rows_of(v),     rows[0],       rows[1],    rows[2]};
  {
    py::gil_scoped_release nogil;
    for (const Tensor& x : grads) clear_unused(x, &x == &grads[0] ? schedule.query_runs : schedule.key_runs);
    masked_attention_backward_cpu(params);
  }
  return grads;
}

void bind_masked_attention(py::module_& m) {
  m.def("masked_attention_forward_cpu", &forward_cpu);
  m.def("masked_attention_backward_cpu", &backward_cpu);
}

} // namespace jepa
