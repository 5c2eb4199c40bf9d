// The gradient of one head of keys in one sequence, query head after query head, block after block. A block
// of queries sees all its keys at once: the mean of its d weights is needed before any d score.
#pragma once
#include "masked_attention/block.h"
#include "masked_attention/softmax.h"
#include "masked_attention/tile.h"

namespace jepa::JEPA_ISA {

template <class T> struct Backward {
  const MaskedAttentionBackwardParams& p;
  const AttentionShape& shape = p.shape;
  const Sequence sequence;
  const int64_t key_head, keys = sequence.keys.count, width = shape.width, row = scratch_row(width);
  float *k, *v, *dk, *dv, *weights, *dscores, *q, *q_lanes, *grad, *grad_lanes, *dq;

  static int64_t floats(const AttentionShape& s) {
    const int64_t row = scratch_row(s.width);
    return s.most_keys * (4 * row + 2 * BLOCK) + BLOCK * (3 * row + 2 * s.width);
  }

  Backward(const MaskedAttentionBackwardParams& params, int64_t s, int64_t head, Scratch scratch)
      : p(params), sequence(shape, s), key_head(head), k(scratch.take(keys * row)),
        v(scratch.take(keys * row)), dk(scratch.take(keys * row)), dv(scratch.take(keys * row)),
        weights(scratch.take(keys * BLOCK)), dscores(scratch.take(keys * BLOCK)),
        q(scratch.take(BLOCK * row)), q_lanes(scratch.take(BLOCK * width)), grad(scratch.take(BLOCK * row)),
        grad_lanes(scratch.take(BLOCK * width)), dq(scratch.take(BLOCK * row)) {}

  void run() {
    read_rows(sequence.key_rows<const T>(p.k, 0, key_head), sequence.k_turns(0), keys, width, k);
    read_rows(sequence.key_rows<const T>(p.v, 0, key_head), Turns{}, keys, width, v);
    clear_rows(dk, keys, width);
    clear_rows(dv, keys, width);
    const int64_t group = shape.heads / shape.key_heads, queries = sequence.queries.count;
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
      for (int64_t i = 0; i < queries; i += BLOCK)
        add_block(i, queries - i < BLOCK ? queries - i : BLOCK, head);
    write_grads(dk, shape.scale, sequence.k_turns(0), keys, width, sequence.key_rows<T>(p.dk, 0, key_head));
    write_grads(dv, 1.f, Turns{}, keys, width, sequence.key_rows<T>(p.dv, 0, key_head));
  }

  void add_block(int64_t first, int64_t count, int64_t head) {
    const Visible visible = sequence.visible(first, count);
    const int64_t seen = visible.last - visible.first, skip = visible.first * row;
    const Turns turns = sequence.turns(first);
    read_block(sequence.query_rows<const T>(p.q, first, head), turns, count, width, q, q_lanes);
    read_block(sequence.query_rows<const T>(p.grad, first, head), Turns{}, count, width, grad, grad_lanes);
    multiply(seen, count, {width, k + skip, row, 1, q_lanes, BLOCK, weights, BLOCK, false});
    multiply(seen, count, {width, v + skip, row, 1, grad_lanes, BLOCK, dscores, BLOCK, false});
    visible.hide(weights, visible.first, visible.last, count);
    softmax_backward(weights, dscores, seen, count, shape.scale * LOG2_E);
    multiply(seen, width, {count, weights, BLOCK, 1, grad, row, dv + skip, row, true});
    multiply(seen, width, {count, dscores, BLOCK, 1, q, row, dk + skip, row, true});
    clear_rows(dq, count, width);
    multiply(count, width, {seen, dscores, 1, BLOCK, k + skip, row, dq, row, true});
    write_grads(dq, shape.scale, turns, count, width, sequence.query_rows<T>(p.dq, first, head));
  }
};

template <class T> static void backward(const MaskedAttentionBackwardParams& p) {
  if (p.shape.key_heads == 0) return;
  for_each_item(p.shape, Backward<T>::floats(p.shape),
                [&](const AttentionTask& task, int64_t key_head, Scratch scratch) {
                  Backward<T>(p, task.sequence, key_head, scratch).run();
                });
}

} // namespace jepa::JEPA_ISA
