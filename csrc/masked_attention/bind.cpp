#include "masked_attention/arguments.h"
#include "masked_attention/check.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>

namespace jepa {

constexpr int64_t BLOCK = 48;   // the kernels' queries at a time
constexpr int64_t MOST = 11;    // such blocks of a task: the more, the less often keys are read and turned
constexpr int64_t TASKS = 4;    // for each thread, at least, where there are so many blocks
constexpr int64_t KEYS = 256;   // and keys, where not all
constexpr int64_t WHOLE = 4096; // keys of a sequence that one thread may hold
constexpr int64_t HEADS_WIDE = 128, HEADS_CACHED = 1 << 16;
constexpr int64_t SMALL = 1 << 16; // multiply-adds that are not worth a second thread

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

// The sequences of a call, and how they are shared out.
struct Schedule {
  AttentionShape shape{};
  std::vector<AttentionTask> tasks;
  Runs query_runs, key_runs;
  int64_t sequences, products = 0; // queries x keys, of one head

  Schedule(const Tensor& q, const Tensor& k, const Options& options)
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
    sequences = dense ? q.size(0) : query_runs.count();
    for (int64_t s = 0; s < sequences; ++s) {
      products += queries_of(s) * keys_of(s);
      shape.most_keys = std::max(shape.most_keys, keys_of(s));
    }
    shape.threads = products * shape.heads * shape.width < SMALL ? 1 : torch_threads();
  }

  int64_t queries_of(int64_t s) const { return shape.cu_seqlens ? query_runs.length(s) : shape.queries; }
  int64_t keys_of(int64_t s) const { return shape.k_cu_seqlens ? key_runs.length(s) : shape.keys; }
  int64_t group() const { return shape.key_heads ? shape.heads / shape.key_heads : 1; }

  // Once `tasks` is full: the most work first. `rows`: of scratch memory that a head fills.
  void take_tasks(int64_t rows) {
    sort(tasks);
    shape.tasks = tasks.data();
    shape.task_count = static_cast<int64_t>(tasks.size());
    // Heads side by side share cache lines and pages.
    const int64_t cached = HEADS_CACHED / std::max<int64_t>(1, rows * shape.width);
    const int64_t fair = shape.task_count * shape.key_heads / (TASKS * shape.threads);
    shape.head_step = std::max<int64_t>(1, std::min({HEADS_WIDE / shape.width, cached, fair}));
  }

  void sort(std::vector<AttentionTask>& list) const {
    std::stable_sort(list.begin(), list.end(),
                     [this](const AttentionTask& a, const AttentionTask& b) { return work(a) > work(b); });
  }

private:
  int64_t work(const AttentionTask& t) const {
    const int64_t keys = keys_of(t.sequence), last = t.first + t.count - 1;
    const int64_t position = keys - queries_of(t.sequence) + last;
    return t.count * (shape.frame_size ? frame_end(position, shape.frame_size, keys) : keys);
  }
};

// Tasks of a few blocks of queries. No result depends on how many: a block is computed alike in any task.
static void schedule_forward(Schedule& s) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < s.sequences; ++i) blocks += (s.queries_of(i) + BLOCK - 1) / BLOCK;
  const int64_t fair = blocks * s.shape.heads / (TASKS * s.shape.threads);
  const int64_t most = BLOCK * std::max<int64_t>(1, std::min(MOST, fair) / s.group());
  for (int64_t i = 0; i < s.sequences; ++i)
    for (int64_t first = 0; first < s.queries_of(i); first += most) {
      s.tasks.push_back({i, first, std::min(most, s.queries_of(i) - first)});
      s.shape.most_queries = std::max(s.shape.most_queries, s.tasks.back().count);
    }
  s.take_tasks(2 * std::min(s.shape.most_keys, KEYS));
}

// Whole sequences, and parts of those that one thread would work on while others have nothing left to do, or
// whose keys would fill too much of its memory. Both ways give the same bits.
struct Parts {
  std::vector<AttentionTask> queries, keys;
  int64_t most_whole_keys = 0;

  explicit Parts(Schedule& s) {
    const int64_t threads = s.shape.threads;
    for (int64_t i = 0; i < s.sequences; ++i) {
      const int64_t n = s.queries_of(i), m = s.keys_of(i);
      const bool alone = threads > 1 && 4 * n * m * threads > 6 * s.products * s.shape.key_heads;
      if (m <= WHOLE && !alone) {
        s.tasks.push_back({i, 0, n});
        most_whole_keys = std::max(most_whole_keys, m);
        continue;
      }
      for (int64_t first = 0; first < n; first += BLOCK)
        queries.push_back({i, first, std::min(BLOCK, n - first)});
      for (int64_t first = 0; first < m; first += KEYS) keys.push_back({i, first, std::min(KEYS, m - first)});
    }
    s.take_tasks(4 * most_whole_keys);
    s.sort(queries);
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
  Schedule schedule(q, k, options);
  schedule_forward(schedule);
  const Tensor out = empty_like(q), lse = empty_lse(q);
  const MaskedAttentionForwardParams params{schedule.shape, rows_of(q),   rows_of(k),
                                            rows_of(v),     rows_of(out), lse_rows_of(lse)};
  {
    py::gil_scoped_release nogil;
    clear_unused(out, schedule.query_runs);
    hide_unused(lse, schedule.query_runs);
    masked_attention_forward_cpu(params);
  }
  return {out, lse};
}

static std::vector<Tensor> backward_cpu(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                        py::handle, const Tensor& lse, const py::args& rest) {
  const Options options(rest);
  check(q, k, v, options);
  Schedule schedule(q, k, options);
  const Parts parts(schedule);
  for (int i = 0; i < q.dim(); ++i) require(grad.size(i) == q.size(i), "grad must have q's shape");
  require(lse.dim() == q.dim() - 1, "lse must be what forward gave");
  AttentionRows rows[3];
  const std::vector<Tensor> grads = empty_grads(q, k, v, rest[12].cast<bool>(), rows);
  const int64_t one = parts.queries.empty() ? 0 : q.numel() / q.size(-1);
  std::vector<float> stats(3 * one);
  const MaskedAttentionBackwardParams params{
      schedule.shape,
      rows_of(grad),
      rows_of(q),
      rows_of(k),
      rows_of(v),
      rows[0],
      rows[1],
      rows[2],
      parts.queries.data(),
      parts.keys.data(),
      static_cast<int64_t>(parts.queries.size()),
      static_cast<int64_t>(parts.keys.size()),
      parts.most_whole_keys,
      {stats.data(), q.dim() == 3 ? 0 : lse.stride(0), 1, lse.stride(-2), one}};
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
#if JEPA_CUDA
  bind_masked_attention_cuda(m);
#endif
}

} // namespace jepa
