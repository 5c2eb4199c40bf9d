// Sequences, the scratch memory of a thread, and blocks of queries in it.
#pragma once
#include <new>

#include "common/parallel.h"
#include "masked_attention/format.h"
#include "masked_attention/rows.h"
#include "masked_attention/visible.h"

namespace jepa::JEPA_ISA {

constexpr int64_t KEYS = 256; // at a time, where not all are

struct Span {
  int64_t begin, count;
};

static Span span_of(const int32_t* cu_seqlens, int64_t length, int64_t s) {
  if (!cu_seqlens) return {0, length};
  return {cu_seqlens[s], cu_seqlens[s + 1] - cu_seqlens[s]};
}

template <class T>
static View<T> view_of(const AttentionRows& x, int64_t sequence, int64_t row, int64_t head) {
  return {static_cast<T*>(x.data) + sequence * x.sequence + row * x.row + head * x.head, x.row, x.head,
          x.channel};
}

static Turns turns_of(const AttentionTurns& x, int64_t sequence, int64_t row) {
  return {x.data ? x.data + sequence * x.sequence + row * x.row : nullptr, x.row, x.channels, x.half};
}

// One sequence of a call.
struct Sequence {
  const AttentionShape& shape;
  int64_t index;
  Span queries, keys;

  Sequence(const AttentionShape& s, int64_t i)
      : shape(s), index(i), queries(span_of(s.cu_seqlens, s.queries, i)),
        keys(span_of(s.k_cu_seqlens, s.keys, i)) {}

  // What queries [first, first + count) see.
  Visible visible(int64_t first, int64_t count) const {
    const AttentionRanges& r = shape.ranges;
    const int32_t* ranges = r.data ? r.data + index * r.sequence + (queries.begin + first) * r.row : nullptr;
    return {shape, keys.count - queries.count + first, ranges, count, keys.count};
  }

  // Row `first` of the sequence's queries or keys, and those behind it, of one head.
  template <class T> View<T> query_rows(const AttentionRows& x, int64_t first, int64_t head) const {
    return view_of<T>(x, index, queries.begin + first, head);
  }
  template <class T> View<T> key_rows(const AttentionRows& x, int64_t first, int64_t head) const {
    return view_of<T>(x, index, keys.begin + first, head);
  }
  Turns turns(int64_t first) const { return turns_of(shape.turns, index, queries.begin + first); }
  Turns k_turns(int64_t first) const { return turns_of(shape.k_turns, index, keys.begin + first); }
};

// One thread's memory, cut up in order.
struct Scratch {
  float* next;
  float* take(int64_t floats) {
    float* taken = next;
    next += (floats + 15) / 16 * 16;
    return taken;
  }
};

static int64_t whole_registers(int64_t lanes) { return (lanes + W - 1) / W * W; }

static int64_t blocks_of(int64_t queries) { return (queries + BLOCK - 1) / BLOCK; }

// A block of queries transposed, 0 in the lanes past the last; rows past it are cleared.
template <class F> static void transpose_block(float* rows, int64_t count, int64_t width, float* lanes) {
  const int64_t filled = whole_registers(count);
  clear_rows(rows + count * scratch_row(width), filled - count, width);
  F::to_lanes(rows, filled, width, lanes);
}

// Heads of keys [first, first + count) and the heads of queries that read them.
struct Heads {
  int64_t first, count, group;
  int64_t queries() const { return count * group; }
  int64_t first_query() const { return first * group; }
};

// body(task, heads, scratch) for each task and each `step` heads of keys, with `floats` of scratch memory.
template <class Body>
static void for_each_item(const AttentionShape& s, const AttentionTask* tasks, int64_t count, int64_t step,
                          int64_t floats, Body body) {
  const int64_t steps = (s.key_heads + step - 1) / step, items = count * steps;
  const int threads = s.threads < items ? s.threads : static_cast<int>(items);
  if (items == 0) return;
  constexpr std::align_val_t line{64};
  float* memory = static_cast<float*>(operator new(threads * floats * sizeof(float), line));
  parallel_dynamic(items, threads, [&](int64_t item) {
    const int64_t first = item % steps * step, left = s.key_heads - first;
    const Heads heads{first, left < step ? left : step, s.heads / s.key_heads};
    body(tasks[item / steps], heads, Scratch{memory + thread_rank() * floats});
  });
  operator delete(memory, line);
}

} // namespace jepa::JEPA_ISA
