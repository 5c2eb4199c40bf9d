// The keys pass in blocks that the second-level cache holds, and each block of queries keeps the largest
// score and the sum of weights so far. Where one block holds all keys nothing is ever rescaled. No result
// depends on anything but its own sequence.
#pragma once
#include "masked_attention/block.h"
#include "masked_attention/softmax.h"
#include "masked_attention/tile.h"

namespace jepa::JEPA_ISA {

constexpr int64_t KEYS = 256; // at a time

// A block of queries of one head: transposed queries, sums of weighted values, and the softmax so far.
struct ForwardBlock {
  float *lanes, *out, *top, *sum;

  static int64_t floats(int64_t width) { return BLOCK * (width + scratch_row(width) + 2); }
  ForwardBlock(float* memory, int64_t width)
      : lanes(memory), out(lanes + BLOCK * width), top(out + BLOCK * scratch_row(width)), sum(top + BLOCK) {}
};

// One head of keys, and all heads of queries that read it, of a task.
template <class T> struct Forward {
  const MaskedAttentionForwardParams& p;
  const AttentionTask& task;
  const Sequence sequence;
  const AttentionShape& shape = p.shape;
  const int64_t key_head, group = shape.heads / shape.key_heads;
  const int64_t width = shape.width, row = scratch_row(width), per_head = blocks_of(task.count);
  float *k, *v, *scores, *past, *blocks;

  static int64_t floats(const AttentionShape& s) {
    const int64_t keys = s.most_keys < KEYS ? s.most_keys : KEYS;
    const int64_t blocks = blocks_of(s.most_queries) * (s.heads / s.key_heads);
    return keys * (2 * scratch_row(s.width) + BLOCK) + BLOCK + blocks * ForwardBlock::floats(s.width);
  }

  Forward(const MaskedAttentionForwardParams& params, const AttentionTask& t, int64_t head, Scratch scratch)
      : p(params), task(t), sequence(params.shape, t.sequence), key_head(head) {
    const int64_t keys = sequence.keys.count < KEYS ? sequence.keys.count : KEYS;
    k = scratch.take(keys * row);
    v = scratch.take(keys * row);
    scores = scratch.take(keys * BLOCK);
    past = scratch.take(BLOCK);
    blocks = scratch.take(0);
  }

  int64_t first_of(int64_t b) const { return task.first + b % per_head * BLOCK; }
  int64_t head_of(int64_t b) const { return key_head * group + b / per_head; }
  int64_t count_of(int64_t b) const {
    const int64_t left = task.first + task.count - first_of(b);
    return left < BLOCK ? left : BLOCK;
  }
  ForwardBlock block(int64_t b) const { return {blocks + b * ForwardBlock::floats(width), width}; }

  void run() {
    Visible seen = sequence.visible(task.first, 0);
    for (int64_t b = 0; b < group * per_head; ++b) {
      start(b);
      seen.include(sequence.visible(first_of(b), count_of(b)));
    }
    for (int64_t from = seen.first / KEYS * KEYS; from < seen.last; from += KEYS) {
      const int64_t to = seen.last - from < KEYS ? seen.last : from + KEYS;
      read_rows(sequence.key_rows<const T>(p.k, from, key_head), sequence.k_turns(from), to - from, width, k);
      read_rows(sequence.key_rows<const T>(p.v, from, key_head), Turns{}, to - from, width, v);
      for (int64_t b = 0; b < group * per_head; ++b) attend(b, from, to);
    }
    for (int64_t b = 0; b < group * per_head; ++b) finish(b);
  }

  void start(int64_t b) {
    const ForwardBlock block = this->block(b);
    read_block(sequence.query_rows<const T>(p.q, first_of(b), head_of(b)), sequence.turns(first_of(b)),
               count_of(b), width, block.out, block.lanes);
    clear_rows(block.out, count_of(b), width);
    for (int64_t i = 0; i < BLOCK; ++i) {
      block.top[i] = NO_TOP;
      block.sum[i] = 0;
    }
  }

  // Adds keys [begin, end), which start `k` and `v`.
  void attend(int64_t b, int64_t begin, int64_t end) {
    const int64_t count = count_of(b);
    const Visible visible = sequence.visible(first_of(b), count);
    const int64_t from = visible.first > begin ? visible.first : begin;
    const int64_t to = visible.last < end ? visible.last : end, keys = to - from, skip = (from - begin) * row;
    if (keys <= 0) return;
    const ForwardBlock block = this->block(b);
    multiply(keys, count, {width, k + skip, row, 1, block.lanes, BLOCK, scores, BLOCK, false});
    visible.hide(scores, from, to, count);
    softmax(scores, keys, count, shape.scale * LOG2_E, block.top, block.sum, past);
    if (visible.first < begin) scale_rows(block.out, past, count, width);
    multiply(count, width, {keys, scores, 1, BLOCK, v + skip, row, block.out, row, true});
  }

  void finish(int64_t b) {
    const ForwardBlock block = this->block(b);
    const int64_t first = first_of(b), head = head_of(b), count = count_of(b);
    for (int64_t i = 0; i < count; i += W) {
      const vf sum = load(block.sum + i), lse = mul(set1(LN_2), log2v(sum));
      const int n = count - i < W ? static_cast<int>(count - i) : W;
      store(past + i, inverse_of(sum));
      store_first(sequence.query_rows<float>(p.lse, first, head).data + i,
                  fma(set1(shape.scale), load(block.top + i), lse), n);
    }
    write_rows(block.out, past, count, width, sequence.query_rows<T>(p.out, first, head));
  }
};

template <class T> static void forward(const MaskedAttentionForwardParams& p) {
  if (p.shape.key_heads == 0) return;
  for_each_item(p.shape, Forward<T>::floats(p.shape),
                [&](const AttentionTask& task, int64_t key_head, Scratch scratch) {
                  Forward<T>(p, task, key_head, scratch).run();
                });
}

} // namespace jepa::JEPA_ISA
