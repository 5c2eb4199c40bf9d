#include "masked_attention/schedule.h"

#include <algorithm>

namespace jepa {

constexpr int64_t BLOCK = 48;   // the kernels' queries at a time
constexpr int64_t MOST = 11;    // such blocks of a task: the more, the less often keys are read and turned
constexpr int64_t TASKS = 4;    // for each thread, at least, where there are so many blocks
constexpr int64_t KEYS = 256;   // and keys, where not all
constexpr int64_t WHOLE = 4096; // keys of a sequence that one thread may hold
constexpr int64_t HEADS_WIDE = 128, HEADS_CACHED = 1 << 16;
constexpr int64_t SMALL = 1 << 16; // multiply-adds that are not worth a second thread

namespace {

struct Lengths {
  const AttentionShape& shape;

  int64_t queries(int64_t s) const {
    return shape.cu_seqlens ? shape.cu_seqlens[s + 1] - shape.cu_seqlens[s] : shape.queries;
  }
  int64_t keys(int64_t s) const {
    return shape.k_cu_seqlens ? shape.k_cu_seqlens[s + 1] - shape.k_cu_seqlens[s] : shape.keys;
  }

  // Of a task, as the number of queries times that of keys.
  int64_t work(const AttentionTask& t) const {
    const int64_t m = keys(t.sequence), last = t.first + t.count - 1;
    const int64_t position = m - queries(t.sequence) + last;
    return t.count * (shape.frame_size ? frame_end(position, shape.frame_size, m) : m);
  }

  // The most work first.
  void sort(std::vector<AttentionTask>& tasks) const {
    std::stable_sort(tasks.begin(), tasks.end(),
                     [this](const AttentionTask& a, const AttentionTask& b) { return work(a) > work(b); });
  }
};

// Queries x keys, of one head. Sets most_keys and threads on the way.
int64_t measure(AttentionShape& shape, int64_t sequences) {
  const Lengths lengths{shape};
  int64_t products = 0;
  shape.most_queries = shape.most_keys = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    products += lengths.queries(s) * lengths.keys(s);
    shape.most_keys = std::max(shape.most_keys, lengths.keys(s));
  }
  if (products * shape.heads * shape.width < SMALL || shape.threads < 1) shape.threads = 1;
  return products;
}

// `rows`: of scratch memory that a head fills.
void take_tasks(AttentionShape& shape, std::vector<AttentionTask>& tasks, int64_t rows) {
  Lengths{shape}.sort(tasks);
  shape.tasks = tasks.data();
  shape.task_count = static_cast<int64_t>(tasks.size());
  // Heads side by side share cache lines and pages.
  const int64_t cached = HEADS_CACHED / std::max<int64_t>(1, rows * shape.width);
  const int64_t fair = shape.task_count * shape.key_heads / (TASKS * shape.threads);
  shape.head_step = std::max<int64_t>(1, std::min({HEADS_WIDE / shape.width, cached, fair}));
}

} // namespace

// Tasks of a few blocks of queries. No result depends on how many: a block is computed alike in any task.
void schedule_attention_forward(AttentionShape& shape, int64_t sequences, std::vector<AttentionTask>& tasks) {
  const Lengths lengths{shape};
  measure(shape, sequences);
  tasks.clear();
  int64_t blocks = 0;
  for (int64_t i = 0; i < sequences; ++i) blocks += (lengths.queries(i) + BLOCK - 1) / BLOCK;
  const int64_t fair = blocks * shape.heads / (TASKS * shape.threads);
  const int64_t group = shape.key_heads ? shape.heads / shape.key_heads : 1;
  const int64_t most = BLOCK * std::max<int64_t>(1, std::min(MOST, fair) / group);
  for (int64_t i = 0; i < sequences; ++i)
    for (int64_t first = 0; first < lengths.queries(i); first += most) {
      tasks.push_back({i, first, std::min(most, lengths.queries(i) - first)});
      shape.most_queries = std::max(shape.most_queries, tasks.back().count);
    }
  take_tasks(shape, tasks, 2 * std::min(shape.most_keys, KEYS));
}

// Both ways, whole and in parts, give the same bits.
void schedule_attention_backward(AttentionShape& shape, int64_t sequences, AttentionBackwardTasks& tasks) {
  const Lengths lengths{shape};
  const int64_t products = measure(shape, sequences), threads = shape.threads;
  tasks = {};
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t n = lengths.queries(i), m = lengths.keys(i);
    const bool alone = threads > 1 && 4 * n * m * threads > 6 * products * shape.key_heads;
    if (m <= WHOLE && !alone) {
      tasks.whole.push_back({i, 0, n});
      tasks.most_whole_keys = std::max(tasks.most_whole_keys, m);
      continue;
    }
    for (int64_t first = 0; first < n; first += BLOCK)
      tasks.query_parts.push_back({i, first, std::min(BLOCK, n - first)});
    for (int64_t first = 0; first < m; first += KEYS)
      tasks.key_parts.push_back({i, first, std::min(KEYS, m - first)});
  }
  take_tasks(shape, tasks.whole, 4 * tasks.most_whole_keys);
  lengths.sort(tasks.query_parts);
}

} // namespace jepa
