// The gradients of some heads of one sequence, block of queries after block. A block sees all its keys at
// once: the mean of its d weights is needed before any d score.
#pragma once
#include "masked_attention/block.h"
#include "masked_attention/softmax.h"
#include "masked_attention/tile.h"

namespace jepa::JEPA_ISA {

// A block of queries of one head: rows, and the same transposed.
struct BackwardBlock {
  float *q, *grad, *dq;

  static int64_t floats(int64_t width) { return 3 * BLOCK * scratch_row(width); }
  BackwardBlock(float* memory, int64_t width)
      : q(memory), grad(q + BLOCK * scratch_row(width)), dq(grad + BLOCK * scratch_row(width)) {}
};

template <class T> struct Backward {
  const MaskedAttentionBackwardParams& p;
  const AttentionShape& shape;
  const Heads& heads;
  const Sequence sequence;
  const int64_t keys = sequence.keys.count, width = shape.width, row = scratch_row(width);
  const int64_t keys_floats = keys * row, block_floats = BackwardBlock::floats(width);
  float *k, *v, *dk, *dv, *weights, *dscores, *q_lanes, *grad_lanes, *blocks;

  static int64_t floats(const AttentionShape& s) {
    const int64_t row = scratch_row(s.width);
    return s.most_keys * (4 * row * s.head_step + 2 * BLOCK) + 2 * BLOCK * s.width +
           s.heads / s.key_heads * s.head_step * BackwardBlock::floats(s.width) + 128;
  }

  Backward(const MaskedAttentionBackwardParams& params, int64_t s, const Heads& h, Scratch scratch)
      : p(params), shape(p.shape), heads(h), sequence(shape, s), k(scratch.take(keys_floats * h.count)),
        v(scratch.take(keys_floats * h.count)), dk(scratch.take(keys_floats * h.count)),
        dv(scratch.take(keys_floats * h.count)), weights(scratch.take(keys * BLOCK)),
        dscores(scratch.take(keys * BLOCK)), q_lanes(scratch.take(BLOCK * width)),
        grad_lanes(scratch.take(BLOCK * width)), blocks(scratch.take(0)) {}

  void run() {
    read_rows(sequence.key_rows<const T>(p.k, 0, heads.first), sequence.k_turns(0), keys, heads.count, width,
              k, keys_floats);
    read_rows(sequence.key_rows<const T>(p.v, 0, heads.first), Turns{}, keys, heads.count, width, v,
              keys_floats);
    clear_rows(dk, keys * heads.count, width);
    clear_rows(dv, keys * heads.count, width);
    for (int64_t i = 0; i < sequence.queries.count; i += BLOCK) add_rows(i);
    for (int64_t h = 0; h < heads.count; ++h) {
      const int64_t skip = h * keys_floats, head = heads.first + h;
      write_grads(dk + skip, shape.scale, sequence.k_turns(0), keys, width,
                  sequence.key_rows<T>(p.dk, 0, head));
      write_grads(dv + skip, 1.f, Turns{}, keys, width, sequence.key_rows<T>(p.dv, 0, head));
    }
  }

  void add_rows(int64_t first) {
    const int64_t left = sequence.queries.count - first, count = left < BLOCK ? left : BLOCK;
    const Turns turns = sequence.turns(first);
    const Visible visible = sequence.visible(first, count);
    const int64_t head = heads.first_query();
    read_rows(sequence.query_rows<const T>(p.q, first, head), turns, count, heads.queries(), width,
              BackwardBlock(blocks, width).q, block_floats);
    read_rows(sequence.query_rows<const T>(p.grad, first, head), Turns{}, count, heads.queries(), width,
              BackwardBlock(blocks, width).grad, block_floats);
    for (int64_t h = 0; h < heads.queries(); ++h) {
      const BackwardBlock block(blocks + h * block_floats, width);
      add_block(block, visible, count, h / heads.group * keys_floats + visible.first * row);
      write_grads(block.dq, shape.scale, turns, count, width, sequence.query_rows<T>(p.dq, first, head + h));
    }
  }

  // The first key that the block sees lies `skip` behind `k`.
  void add_block(const BackwardBlock& block, const Visible& visible, int64_t count, int64_t skip) {
    const int64_t seen = visible.last - visible.first;
    to_lanes(block.grad, count, width, grad_lanes);
    to_lanes(block.q, count, width, q_lanes);
    for (int64_t i = 0; i < BLOCK * width; i += W)
      store(q_lanes + i, mul(set1(shape.scale * LOG2_E), load(q_lanes + i)));
    multiply(seen, count, {width, k + skip, row, 1, q_lanes, BLOCK, weights, BLOCK, false});
    multiply(seen, count, {width, v + skip, row, 1, grad_lanes, BLOCK, dscores, BLOCK, false});
    visible.hide(weights, visible.first, visible.last, count);
    softmax_backward(weights, dscores, seen, count);
    multiply(seen, width, {count, weights, BLOCK, 1, block.grad, row, dv + skip, row, true});
    multiply(seen, width, {count, dscores, BLOCK, 1, block.q, row, dk + skip, row, true});
    clear_rows(block.dq, count, width);
    multiply(count, width, {seen, dscores, 1, BLOCK, k + skip, row, block.dq, row, true});
  }
};

template <class T> static void backward(const MaskedAttentionBackwardParams& p) {
  if (p.shape.key_heads == 0) return;
  for_each_item(p.shape, Backward<T>::floats(p.shape),
                [&](const AttentionTask& task, const Heads& heads, Scratch scratch) {
                  Backward<T>(p, task.sequence, heads, scratch).run();
                });
}

} // namespace jepa::JEPA_ISA
