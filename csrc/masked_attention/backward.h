// The gradients of some heads of one sequence, block of queries after block. A block sees all its keys at
// once: the mean of its d weights is needed before any d score. A sequence too large for one thread is taken
// in two steps, both shared out: dq by blocks of queries, then dk and dv by blocks of keys, which compute the
// scores again. Every sum has the same order in both ways, and so the same bits.
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
  const int64_t width = shape.width, row = scratch_row(width), block_floats = BackwardBlock::floats(width);
  const int64_t keys, keys_floats = keys * row; // of one head, as many as lie in scratch at a time
  float *q_lanes, *grad_lanes, *blocks, *k, *v, *dk, *dv, *weights, *dscores;
  SoftmaxStats stats;

  // With room for `keys` of each of `step` heads, and for the scores of `scored` keys.
  static int64_t floats(const AttentionShape& s, int64_t step, int64_t keys, int64_t scored) {
    return keys * 4 * scratch_row(s.width) * step + scored * 2 * BLOCK + BLOCK * (2 * s.width + 3) +
           s.heads / s.key_heads * step * BackwardBlock::floats(s.width) + 256;
  }

  Backward(const MaskedAttentionBackwardParams& params, int64_t s, const Heads& h, int64_t most_keys,
           Scratch scratch)
      : p(params), shape(p.shape), heads(h), sequence(shape, s),
        keys(sequence.keys.count < most_keys ? sequence.keys.count : most_keys),
        q_lanes(scratch.take(BLOCK * width)), grad_lanes(scratch.take(BLOCK * width)),
        blocks(scratch.take(heads.queries() * block_floats)), k(scratch.take(keys_floats * h.count)),
        v(scratch.take(keys_floats * h.count)), dk(scratch.take(keys_floats * h.count)),
        dv(scratch.take(keys_floats * h.count)),
        stats{scratch.take(BLOCK), scratch.take(BLOCK), scratch.take(BLOCK)} {
    weights = scratch.take(0);
  }

  // All of a sequence.
  void whole() {
    start_keys(0, keys);
    dscores = weights + keys * BLOCK;
    for (int64_t first = 0; first < sequence.queries.count; first += BLOCK) {
      const int64_t count = count_of(first, sequence.queries.count);
      const Visible visible = sequence.visible(first, count);
      const int64_t seen = visible.last - visible.first;
      read_queries(first, count);
      for (int64_t h = 0; h < heads.queries(); ++h) {
        const int64_t skip = h / heads.group * keys_floats + visible.first * row;
        to_lanes(h, count);
        score(seen, count, skip, weights, dscores);
        visible.hide(weights, visible.first, visible.last, count);
        softmax_stats(weights, dscores, seen, count, stats);
        softmax_grads(weights, dscores, seen, count, stats);
        add_to_keys(h, seen, count, skip);
        clear_rows(block(h).dq, count, width);
        add_to_queries(h, seen, count, skip, dscores);
        write_queries(h, first, count);
      }
    }
    write_keys(0, keys);
  }

  // dq of some queries, and the softmax's stats.
  void by_queries(const AttentionTask& task) {
    const int64_t end = task.first + task.count;
    dscores = weights + sequence.keys.count * BLOCK;
    for (int64_t first = task.first; first < end; first += BLOCK) {
      const int64_t count = count_of(first, end);
      const Visible visible = sequence.visible(first, count);
      const int64_t seen = visible.last - visible.first;
      read_queries(first, count);
      for (int64_t h = 0; h < heads.queries(); ++h) {
        to_lanes(h, count);
        for (int64_t j = 0; j < seen; j += keys) {
          const int64_t n = j + keys < seen ? keys : seen - j;
          read_keys(visible.first + j, n);
          score(n, count, 0, weights + j * BLOCK, dscores + j * BLOCK);
        }
        visible.hide(weights, visible.first, visible.last, count);
        softmax_stats(weights, dscores, seen, count, stats);
        softmax_grads(weights, dscores, seen, count, stats);
        clear_rows(block(h).dq, count, width);
        for (int64_t j = 0; j < seen; j += keys) {
          const int64_t n = j + keys < seen ? keys : seen - j;
          read_keys(visible.first + j, n);
          add_to_queries(h, n, count, 0, dscores + j * BLOCK);
        }
        write_queries(h, first, count);
        for_each_stat(h, first,
                      [&](const float* mine, float* all) { std::memcpy(all, mine, count * sizeof(float)); });
      }
    }
  }

  // dk and dv of some keys, from the stats.
  void by_keys(int64_t begin, int64_t count_of_keys) {
    const int64_t end = begin + count_of_keys;
    start_keys(begin, count_of_keys);
    dscores = weights + count_of_keys * BLOCK;
    for (int64_t first = 0; first < sequence.queries.count; first += BLOCK) {
      const int64_t count = count_of(first, sequence.queries.count);
      const Visible visible = sequence.visible(first, count);
      const int64_t from = visible.first > begin ? visible.first : begin;
      const int64_t to = visible.last < end ? visible.last : end, seen = to - from;
      if (seen <= 0) continue;
      read_queries(first, count);
      for (int64_t h = 0; h < heads.queries(); ++h) {
        const int64_t skip = (from - begin) * row;
        to_lanes(h, count);
        score(seen, count, skip, weights, dscores);
        visible.hide(weights, from, to, count);
        for_each_stat(h, first,
                      [&](float* mine, const float* all) { std::memcpy(mine, all, count * sizeof(float)); });
        softmax_again(weights, seen, count, stats);
        softmax_grads(weights, dscores, seen, count, stats);
        add_to_keys(h, seen, count, skip);
      }
    }
    write_keys(begin, count_of_keys);
  }

private:
  static int64_t count_of(int64_t first, int64_t end) { return end - first < BLOCK ? end - first : BLOCK; }
  BackwardBlock block(int64_t h) const { return {blocks + h * block_floats, width}; }

  void read_keys(int64_t first, int64_t count) {
    read_rows(sequence.key_rows<const T>(p.k, first, heads.first), sequence.k_turns(first), count,
              heads.count, width, k, keys_floats);
    read_rows(sequence.key_rows<const T>(p.v, first, heads.first), Turns{}, count, heads.count, width, v,
              keys_floats);
  }

  void start_keys(int64_t first, int64_t count) {
    read_keys(first, count);
    clear_rows(dk, keys * heads.count, width);
    clear_rows(dv, keys * heads.count, width);
  }

  void read_queries(int64_t first, int64_t count) {
    const int64_t head = heads.first_query();
    read_rows(sequence.query_rows<const T>(p.q, first, head), sequence.turns(first), count, heads.queries(),
              width, block(0).q, block_floats);
    read_rows(sequence.query_rows<const T>(p.grad, first, head), Turns{}, count, heads.queries(), width,
              block(0).grad, block_floats);
  }

  void to_lanes(int64_t h, int64_t count) {
    transpose_block(block(h).grad, count, width, 1.f, grad_lanes);
    transpose_block(block(h).q, count, width, shape.scale * LOG2_E, q_lanes);
  }

  // Scores and d weights of keys that lie `skip` behind `k`.
  void score(int64_t seen, int64_t count, int64_t skip, float* scores, float* grads) {
    multiply(seen, count, {width, k + skip, row, 1, q_lanes, BLOCK, scores, BLOCK, false});
    multiply(seen, count, {width, v + skip, row, 1, grad_lanes, BLOCK, grads, BLOCK, false});
  }

  void add_to_keys(int64_t h, int64_t seen, int64_t count, int64_t skip) {
    multiply(seen, width, {count, weights, BLOCK, 1, block(h).grad, row, dv + skip, row, true});
    multiply(seen, width, {count, dscores, BLOCK, 1, block(h).q, row, dk + skip, row, true});
  }

  void add_to_queries(int64_t h, int64_t seen, int64_t count, int64_t skip, const float* grads) {
    multiply(count, width, {seen, grads, 1, BLOCK, k + skip, row, block(h).dq, row, true});
  }

  void write_queries(int64_t h, int64_t first, int64_t count) {
    write_grads(block(h).dq, shape.scale, sequence.turns(first), count, width,
                sequence.query_rows<T>(p.dq, first, heads.first_query() + h));
  }

  void write_keys(int64_t first, int64_t count) {
    for (int64_t h = 0; h < heads.count; ++h) {
      const int64_t skip = h * keys_floats, head = heads.first + h;
      write_grads(dk + skip, shape.scale, sequence.k_turns(first), count, width,
                  sequence.key_rows<T>(p.dk, first, head));
      write_grads(dv + skip, 1.f, Turns{}, count, width, sequence.key_rows<T>(p.dv, first, head));
    }
  }

  // body(of this block, of the whole call)
  template <class Body> void for_each_stat(int64_t h, int64_t first, Body body) const {
    float* all = sequence.query_rows<float>(p.stats, first, heads.first_query() + h).data;
    body(stats.top, all);
    body(stats.inverse, all + p.stats.channel);
    body(stats.mean, all + 2 * p.stats.channel);
  }
};

template <class T> static void backward(const MaskedAttentionBackwardParams& p) {
  const AttentionShape& shape = p.shape;
  if (shape.key_heads == 0) return;
  for_each_item(shape, p.query_parts, p.query_part_count, 1,
                Backward<T>::floats(shape, 1, KEYS, shape.most_keys),
                [&](const AttentionTask& task, const Heads& heads, Scratch scratch) {
                  Backward<T>(p, task.sequence, heads, KEYS, scratch).by_queries(task);
                });
  for_each_item(shape, p.key_parts, p.key_part_count, 1, Backward<T>::floats(shape, 1, KEYS, KEYS),
                [&](const AttentionTask& part, const Heads& heads, Scratch scratch) {
                  Backward<T>(p, part.sequence, heads, KEYS, scratch).by_keys(part.first, part.count);
                });
  const int64_t keys = p.most_whole_keys;
  for_each_item(shape, shape.tasks, shape.task_count, shape.head_step,
                Backward<T>::floats(shape, shape.head_step, keys, keys),
                [&](const AttentionTask& task, const Heads& heads, Scratch scratch) {
                  Backward<T>(p, task.sequence, heads, keys, scratch).whole();
                });
}

} // namespace jepa::JEPA_ISA
