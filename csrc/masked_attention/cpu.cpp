// Compute-bound: 4 n m D operations forward, 10 n m D backward, in register tiles over fp32 copies of one
// head of one sequence. A block of queries sees all its keys at once (their scores stay in the second-level
// cache), so the softmax needs no rescaling, and no result depends on anything but its own sequence.
#include "masked_attention/masked_attention.h"

#include <new>

#include "common/floats.h"
#include "common/parallel.h"
#include "masked_attention/rows.h"
#include "masked_attention/softmax.h"
#include "masked_attention/tile.h"

namespace jepa::JEPA_ISA {

struct Span {
  int64_t begin, count;
};

static Span span_of(const int32_t* cu_seqlens, int64_t length, int64_t s) {
  if (!cu_seqlens) return {0, length};
  return {cu_seqlens[s], cu_seqlens[s + 1] - cu_seqlens[s]};
}

template <class T>
static View<T> view_of(const AttentionRows& x, int64_t sequence, int64_t row, int64_t head) {
  return {static_cast<T*>(x.data) + sequence * x.sequence + row * x.row + head * x.head, x.row, x.channel};
}

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

// A block of queries (or of their gradients): rows, and transposed with a query in each lane. Lanes past the
// last query hold 0.
struct Block {
  float *rows, *lanes;
  Block(Scratch& scratch, int64_t width)
      : rows(scratch.take(BLOCK * scratch_row(width))), lanes(scratch.take(width * BLOCK)) {}
  static int64_t floats(int64_t width) { return BLOCK * scratch_row(width) + width * BLOCK; }

  template <class T> void read(View<const T> in, int64_t count, int64_t width) {
    read_rows(in, count, width, rows);
    const int64_t filled = whole_registers(count);
    clear_rows(rows + count * scratch_row(width), filled - count, width);
    transpose(rows, filled, width, lanes, BLOCK);
  }
};

template <class Body>
static void for_each_item(const AttentionShape& s, int64_t heads, int64_t floats, Body body) {
  const int64_t items = s.task_count * heads;
  const int threads = s.threads < items ? s.threads : static_cast<int>(items);
  if (items == 0) return;
  constexpr std::align_val_t line{64};
  float* memory = static_cast<float*>(operator new(threads * floats * sizeof(float), line));
  parallel_dynamic(items, threads, [&](int64_t item) {
    body(s.tasks[item / heads], item % heads, Scratch{memory + omp_get_thread_num() * floats});
  });
  operator delete(memory, line);
}

template <class T> static void forward(const MaskedAttentionForwardParams& p) {
  const AttentionShape& shape = p.shape;
  const int64_t width = shape.width, row = scratch_row(width);
  const int64_t floats = shape.longest_keys * (2 * row + BLOCK) + Block::floats(width) + BLOCK;
  for_each_item(shape, shape.heads, floats, [&](const AttentionTask& task, int64_t head, Scratch scratch) {
    const int64_t s = task.sequence, key_head = head / (shape.heads / shape.key_heads);
    const Span keys = span_of(shape.k_cu_seqlens, shape.keys, s);
    float *k = scratch.take(keys.count * row), *v = scratch.take(keys.count * row);
    float *scores = scratch.take(keys.count * BLOCK), *inverse = scratch.take(BLOCK);
    Block q(scratch, width);
    read_rows(view_of<const T>(p.k, s, keys.begin, key_head), keys.count, width, k);
    read_rows(view_of<const T>(p.v, s, keys.begin, key_head), keys.count, width, v);
    const int64_t begin = span_of(shape.cu_seqlens, shape.queries, s).begin + task.first;
    for (int64_t i = 0; i < task.count; i += BLOCK) {
      const int64_t queries = task.count - i < BLOCK ? task.count - i : BLOCK;
      q.read(view_of<const T>(p.q, s, begin + i, head), queries, width);
      multiply(keys.count, queries, width, Rows{k, row}, q.lanes, BLOCK, Overwrite{scores, BLOCK});
      softmax(scores, keys.count, queries, shape.scale * LOG2_E, inverse);
      if (keys.count == 0) std::memset(inverse, 0, BLOCK * sizeof(float));
      const View<T> out = view_of<T>(p.out, s, begin + i, head);
      multiply(queries, width, keys.count, Columns{scores, BLOCK}, v, row,
               Scaled<T>{out.data, out.row, width, inverse});
    }
  });
}

void masked_attention_forward_cpu(const MaskedAttentionForwardParams& p) {
  with_float(p.shape.dtype, [&](auto x) { forward<decltype(x)>(p); });
}

// The gradient of one head of keys in one sequence, query head after query head, block after block.
template <class T> struct Backward {
  const MaskedAttentionBackwardParams& p;
  const AttentionShape& shape = p.shape;
  int64_t sequence;
  Span keys;
  int64_t width = shape.width, row = scratch_row(width);
  float *k, *v, *dk, *dv, *weights, *dscores, *scale;
  Block q, grad;

  static int64_t floats(const AttentionShape& shape) {
    const int64_t per_key = 4 * scratch_row(shape.width) + 2 * BLOCK;
    return shape.longest_keys * per_key + 2 * Block::floats(shape.width) + BLOCK;
  }

  Backward(const MaskedAttentionBackwardParams& params, int64_t s, int64_t key_head, Scratch scratch)
      : p(params), sequence(s), keys(span_of(shape.k_cu_seqlens, shape.keys, s)),
        k(scratch.take(keys.count * row)), v(scratch.take(keys.count * row)),
        dk(scratch.take(keys.count * row)), dv(scratch.take(keys.count * row)),
        weights(scratch.take(keys.count * BLOCK)), dscores(scratch.take(keys.count * BLOCK)),
        scale(scratch.take(BLOCK)), q(scratch, width), grad(scratch, width) {
    read_rows(view_of<const T>(p.k, s, keys.begin, key_head), keys.count, width, k);
    read_rows(view_of<const T>(p.v, s, keys.begin, key_head), keys.count, width, v);
    clear_rows(dk, keys.count, width);
    clear_rows(dv, keys.count, width);
    for (int64_t i = 0; i < BLOCK; ++i) scale[i] = shape.scale;
  }

  void add_block(int64_t first, int64_t count, int64_t head) {
    q.read(view_of<const T>(p.q, sequence, first, head), count, width);
    grad.read(view_of<const T>(p.grad, sequence, first, head), count, width);
    multiply(keys.count, count, width, Rows{k, row}, q.lanes, BLOCK, Overwrite{weights, BLOCK});
    multiply(keys.count, count, width, Rows{v, row}, grad.lanes, BLOCK, Overwrite{dscores, BLOCK});
    softmax_backward(weights, dscores, keys.count, count, shape.scale * LOG2_E);
    multiply(keys.count, width, count, Rows{weights, BLOCK}, grad.rows, row, Accumulate{dv, row});
    multiply(keys.count, width, count, Rows{dscores, BLOCK}, q.rows, row, Accumulate{dk, row});
    const View<T> dq = view_of<T>(p.dq, sequence, first, head);
    multiply(count, width, keys.count, Columns{dscores, BLOCK}, k, row,
             Scaled<T>{dq.data, dq.row, width, scale});
  }
};

template <class T> static void backward(const MaskedAttentionBackwardParams& p) {
  const AttentionShape& shape = p.shape;
  const int64_t group = shape.key_heads ? shape.heads / shape.key_heads : 0;
  for_each_item(shape, shape.key_heads, Backward<T>::floats(shape),
                [&](const AttentionTask& task, int64_t key_head, Scratch scratch) {
                  const int64_t s = task.sequence;
                  Backward<T> all(p, s, key_head, scratch);
                  const int64_t begin = span_of(shape.cu_seqlens, shape.queries, s).begin;
                  for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
                    for (int64_t i = 0; i < task.count; i += BLOCK)
                      all.add_block(begin + i, task.count - i < BLOCK ? task.count - i : BLOCK, head);
                  write_rows(all.dk, all.keys.count, shape.width, shape.scale,
                             view_of<T>(p.dk, s, all.keys.begin, key_head));
                  write_rows(all.dv, all.keys.count, shape.width, 1.f,
                             view_of<T>(p.dv, s, all.keys.begin, key_head));
                });
}

void masked_attention_backward_cpu(const MaskedAttentionBackwardParams& p) {
  with_float(p.shape.dtype, [&](auto x) { backward<decltype(x)>(p); });
}

} // namespace jepa::JEPA_ISA
