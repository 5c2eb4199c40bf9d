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
  using F = typename FormatOf<T>::type;
  const MaskedAttentionBackwardParams& p;
  const AttentionShape& shape;
  const Heads& heads;
  const Sequence sequence;
  const int64_t width = shape.width, row = scratch_row(width), left = F::left_row(width),
                block_floats = BackwardBlock::floats(width);
  const int64_t keys, keys_floats = keys * row; // of one head, as many as lie in scratch at a time
  float *q_lanes, *grad_lanes, *blocks, *k, *v, *k_right, *dk, *dv, *weights, *dscores;
  SoftmaxStats stats;

  // With room for `keys` of each of `step` heads, and for the scores of `scored` keys.
  static int64_t floats(const AttentionShape& s, int64_t step, int64_t keys, int64_t scored) {
    return keys * (F::PAIR + 3) * scratch_row(s.width) * step + scored * 2 * BLOCK +
           BLOCK * (2 * s.width + 3) + s.heads / s.key_heads * step * BackwardBlock::floats(s.width) + 256;
  }

  Backward(const MaskedAttentionBackwardParams& params, int64_t s, const Heads& h, int64_t most_keys,
           Scratch scratch)
      : p(params), shape(p.shape), heads(h), sequence(shape, s),
        keys(sequence.keys.count < most_keys ? sequence.keys.count : most_keys),
        q_lanes(scratch.take(BLOCK * width)), grad_lanes(scratch.take(BLOCK * width)),
        blocks(scratch.take(heads.queries() * block_floats)), k(scratch.take(keys_floats * h.count)),
        v(scratch.take(keys_floats * h.count)),
        k_right(F::PAIR == 1 ? k : scratch.take(keys_floats * h.count)),
        dk(scratch.take(keys_floats * h.count)), dv(scratch.take(keys_floats * h.count)),
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
        take_queries(h, count);
        score(h, visible.first, seen, count, weights, dscores);
        visible.hide(weights, visible.first, visible.last, count);
        softmax_stats(weights, dscores, seen, count, stats);
        softmax_grads(weights, dscores, seen, count, stats);
        add_to_keys(h, visible.first, seen, count);
        clear_rows(block(h).dq, count, width);
        F::to_right(dscores, BLOCK, seen, count);
        add_to_queries(h, visible.first, seen, count, dscores);
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
        take_queries(h, count);
        for (int64_t j = 0; j < seen; j += keys) {
          const int64_t n = j + keys < seen ? keys : seen - j;
          read_keys(visible.first + j, n);
          score(h, 0, n, count, weights + j * BLOCK, dscores + j * BLOCK);
        }
        visible.hide(weights, visible.first, visible.last, count);
        softmax_stats(weights, dscores, seen, count, stats);
        softmax_grads(weights, dscores, seen, count, stats);
        clear_rows(block(h).dq, count, width);
        F::to_right(dscores, BLOCK, seen, count);
        for (int64_t j = 0; j < seen; j += keys) {
          const int64_t n = j + keys < seen ? keys : seen - j;
          read_keys(visible.first + j, n);
          add_to_queries(h, 0, n, count, dscores + j / F::PAIR * BLOCK);
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
        take_queries(h, count);
        score(h, from - begin, seen, count, weights, dscores);
        visible.hide(weights, from, to, count);
        for_each_stat(h, first, [&](float* mine, const float* all) {
          std::memset(mine, 0, BLOCK * sizeof(float)); // of lanes past the last, which pairs may hold
          std::memcpy(mine, all, count * sizeof(float));
        });
        softmax_again(weights, seen, count, stats);
        softmax_grads(weights, dscores, seen, count, stats);
        add_to_keys(h, from - begin, seen, count);
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
    for (int64_t h = 0; h < heads.count; ++h) {
      float *key = k + h * keys_floats, *value = v + h * keys_floats, *right = k_right + h * keys_floats;
      if (right != key) std::memcpy(right, key, count * row * sizeof(float));
      F::to_right(right, row, count, width);
      F::to_left(key, row, count, width, key, left);
      F::to_left(value, row, count, width, value, left);
    }
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

  // Makes lanes, and right operands, of a head's queries and their gradients.
  void take_queries(int64_t h, int64_t count) {
    transpose_block<F>(block(h).grad, count, width, grad_lanes);
    transpose_block<F>(block(h).q, count, width, q_lanes);
    F::to_right(block(h).grad, row, count, width);
    F::to_right(block(h).q, row, count, width);
  }

  // Scores and d weights of the keys [from, from + seen) that lie in scratch.
  void score(int64_t h, int64_t from, int64_t seen, int64_t count, float* scores, float* grads) {
    const int64_t skip = h / heads.group * keys_floats + from * left, depth = width / F::PAIR;
    multiply<F>(seen, count,
                {depth, k + skip, left, 1, q_lanes, BLOCK, scores, BLOCK, false, shape.scale * LOG2_E});
    multiply<F>(seen, count, {depth, v + skip, left, 1, grad_lanes, BLOCK, grads, BLOCK, false});
  }

  // Spoils the weights.
  void add_to_keys(int64_t h, int64_t from, int64_t seen, int64_t count) {
    const int64_t skip = h / heads.group * keys_floats + from * row, depth = pairs_of<F>(count);
    const float* p = F::to_left(weights, BLOCK, seen, count, weights, BLOCK);
    multiply<F>(seen, width, {depth, p, BLOCK, 1, block(h).grad, row, dv + skip, row, true});
    const float* ds = F::to_left(dscores, BLOCK, seen, count, weights, BLOCK);
    multiply<F>(seen, width, {depth, ds, BLOCK, 1, block(h).q, row, dk + skip, row, true});
  }

  void add_to_queries(int64_t h, int64_t from, int64_t seen, int64_t count, const float* grads) {
    const float* right = k_right + h / heads.group * keys_floats + from / F::PAIR * row;
    multiply<F>(count, width, {pairs_of<F>(seen), grads, 1, BLOCK, right, row, block(h).dq, row, true});
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
