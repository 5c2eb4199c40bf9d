// The keys pass in blocks that the second-level cache holds, and each block of queries keeps the largest
// score and the sum of weights so far. Where one block holds all keys nothing is ever rescaled. No result
// depends on anything but its own sequence.
#pragma once
#include "masked_attention/block.h"
#include "masked_attention/softmax.h"
#include "masked_attention/tile.h"

namespace jepa::JEPA_ISA {

// A block of queries of one head: transposed queries, sums of weighted values, and the softmax so far.
struct ForwardBlock {
  float *lanes, *out, *top, *sum;

  static int64_t floats(int64_t width) { return BLOCK * (width + scratch_row(width) + 2); }
  ForwardBlock(float* memory, int64_t width)
      : lanes(memory), out(lanes + BLOCK * width), top(out + BLOCK * scratch_row(width)), sum(top + BLOCK) {}
};

// Some heads of a task. Its blocks of queries are numbered by head within their rows.
template <class T> struct Forward {
  using F = typename FormatOf<T>::type;
  const MaskedAttentionForwardParams& p;
  const AttentionShape& shape;
  const AttentionTask& task;
  const Heads& heads;
  const Sequence sequence;
  const int64_t width = shape.width, row = scratch_row(width), block_floats = ForwardBlock::floats(width);
  const int64_t keys_floats = (sequence.keys.count < KEYS ? sequence.keys.count : KEYS) * row;
  float *k, *v, *scores, *past, *blocks;

  static int64_t floats(const AttentionShape& s) {
    const int64_t keys = s.most_keys < KEYS ? s.most_keys : KEYS;
    const int64_t blocks = blocks_of(s.most_queries) * (s.heads / s.key_heads) * s.head_step;
    return keys * (2 * scratch_row(s.width) * s.head_step + BLOCK) + BLOCK +
           blocks * ForwardBlock::floats(s.width) + 64;
  }

  Forward(const MaskedAttentionForwardParams& params, const AttentionTask& t, const Heads& h, Scratch scratch)
      : p(params), shape(p.shape), task(t), heads(h), sequence(shape, t.sequence),
        k(scratch.take(keys_floats * h.count)), v(scratch.take(keys_floats * h.count)),
        scores(scratch.take(keys_floats / row * BLOCK)), past(scratch.take(BLOCK)), blocks(scratch.take(0)) {}

  int64_t count_of(int64_t first) const {
    const int64_t left = task.first + task.count - first;
    return left < BLOCK ? left : BLOCK;
  }
  ForwardBlock block(int64_t first, int64_t head) const {
    return {blocks + ((first - task.first) / BLOCK * heads.queries() + head) * block_floats, width};
  }
  template <class Body> void for_each_block(Body body) {
    for (int64_t first = task.first; first < task.first + task.count; first += BLOCK)
      body(first, count_of(first), sequence.visible(first, count_of(first)));
  }

  void run() {
    Visible seen = sequence.visible(task.first, 0);
    for_each_block([&](int64_t first, int64_t count, const Visible& visible) {
      start(first, count);
      seen.include(visible);
    });
    for (int64_t from = seen.first / KEYS * KEYS; from < seen.last; from += KEYS) {
      const int64_t to = seen.last - from < KEYS ? seen.last : from + KEYS;
      read_keys(from, to - from);
      for (int64_t h = 0; h < heads.queries(); ++h)
        for_each_block([&](int64_t first, int64_t count, const Visible& visible) {
          const int64_t skip = h / heads.group * keys_floats;
          attend(block(first, h), visible, count, from, to, k + skip, v + skip);
        });
    }
    for_each_block([&](int64_t first, int64_t count, const Visible&) {
      for (int64_t h = 0; h < heads.queries(); ++h) finish(block(first, h), first, count, h);
    });
  }

  void read_keys(int64_t first, int64_t count) {
    read_rows(sequence.key_rows<const T>(p.k, first, heads.first), sequence.k_turns(first), count,
              heads.count, width, k, keys_floats);
    read_rows(sequence.key_rows<const T>(p.v, first, heads.first), Turns{}, count, heads.count, width, v,
              keys_floats);
    for (int64_t h = 0; h < heads.count; ++h) {
      F::to_left(k + h * keys_floats, row, count, width, k + h * keys_floats, F::left_row(width));
      F::to_right(v + h * keys_floats, row, count, width);
    }
  }

  void start(int64_t first, int64_t count) {
    read_rows(sequence.query_rows<const T>(p.q, first, heads.first_query()), sequence.turns(first), count,
              heads.queries(), width, block(first, 0).out, block_floats);
    for (int64_t h = 0; h < heads.queries(); ++h) {
      const ForwardBlock b = block(first, h);
      transpose_block<F>(b.out, count, width, b.lanes);
      clear_rows(b.out, count, width);
      for (int64_t i = 0; i < BLOCK; i += W) {
        store(b.top + i, set1(NO_TOP));
        store(b.sum + i, zero());
      }
    }
  }

  // Adds keys [begin, end), of which the first are `key` and `value`.
  void attend(const ForwardBlock& block, const Visible& visible, int64_t count, int64_t begin, int64_t end,
              const float* key, const float* value) {
    const int64_t from = visible.first > begin ? visible.first : begin;
    const int64_t to = visible.last < end ? visible.last : end, keys = to - from;
    if (keys <= 0) return;
    key += (from - begin) * F::left_row(width);
    value += (from - begin) / F::PAIR * row;
    multiply<F>(keys, count,
                {width / F::PAIR, key, F::left_row(width), 1, block.lanes, BLOCK, scores, BLOCK, false,
                 shape.scale * LOG2_E});
    visible.hide(scores, from, to, count);
    softmax(scores, keys, count, block.top, block.sum, past);
    F::to_right(scores, BLOCK, keys, count);
    if (visible.first < begin) scale_rows(block.out, past, count, width);
    multiply<F>(count, width, {pairs_of<F>(keys), scores, 1, BLOCK, value, row, block.out, row, true});
  }

  void finish(const ForwardBlock& block, int64_t first, int64_t count, int64_t h) {
    const int64_t head = heads.first_query() + h;
    for (int64_t i = 0; i < count; i += W) {
      const vf sum = load(block.sum + i), lse = mul(set1(LN_2), add(load(block.top + i), log2v(sum)));
      store(past + i, inverse_of(sum));
      store_first(sequence.query_rows<float>(p.lse, first + i, head).data, lse,
                  count - i < W ? static_cast<int>(count - i) : W);
    }
    write_rows(block.out, past, count, width, sequence.query_rows<T>(p.out, first, head));
  }
};

template <class T> static void forward(const MaskedAttentionForwardParams& p) {
  if (p.shape.key_heads == 0) return;
  const AttentionShape& shape = p.shape;
  for_each_item(shape, shape.tasks, shape.task_count, shape.head_step, Forward<T>::floats(shape),
                [&](const AttentionTask& task, const Heads& heads, Scratch scratch) {
                  Forward<T>(p, task, heads, scratch).run();
                });
}

} // namespace jepa::JEPA_ISA
