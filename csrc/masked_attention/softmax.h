// Softmax to the base 2 down the columns of scores [keys][BLOCK], a query in each lane.
#pragma once
#include "common/simd.h"
#include "masked_attention/visible.h"

namespace jepa::JEPA_ISA {

constexpr float LOG2_E = 1.44269504089f, LN_2 = 0.69314718056f;
// Of no keys. Finite, so that hidden scores lie infinitely far below it.
constexpr float NO_TOP = -std::numeric_limits<float>::max();

static vf top_of(const float* scores, int64_t keys, vf least) {
  vf top[4] = {least, least, least, least};
  int64_t j = 0;
  for (; j + 4 <= keys; j += 4)
    for (int u = 0; u < 4; ++u) top[u] = vmax(top[u], load(scores + (j + u) * BLOCK));
  for (; j < keys; ++j) top[0] = vmax(top[0], load(scores + j * BLOCK));
  return vmax(vmax(top[0], top[1]), vmax(top[2], top[3]));
}

// 1 / sum, and 0 where nothing is seen.
static vf inverse_of(vf sum) { return select(less(zero(), sum), div(set1(1.f), sum), sum); }

// One more block of keys: scores <- 2^(scores - top), where `top` is the largest score so far; sum <- sum of
// all weights so far; past <- what weights of earlier blocks are worth now. The weight of the top is exactly
// 1, however large the scores.
static void softmax(float* scores, int64_t keys, int64_t queries, float* top, float* sum, float* past) {
  for (int64_t i = 0; i < queries; i += W) {
    float* s = scores + i;
    const vf before = load(top + i), now = top_of(s, keys, before);
    const vf shrink = exp2v(sub(before, now));
    vf total = mul(load(sum + i), shrink);
    for (int64_t j = 0; j < keys; ++j) {
      const vf e = exp2v(sub(load(s + j * BLOCK), now));
      store(s + j * BLOCK, e);
      total = add(total, e);
    }
    store(top + i, now);
    store(sum + i, total);
    store(past + i, shrink);
  }
}

// What turns scores and d weights of a block of queries into weights and d scores.
struct SoftmaxStats {
  float *top, *inverse, *mean;
};

// scores <- 2^(scores - top); the stats of all these keys. The mean of the d weights, by weight, comes from
// the same d weights that it is subtracted from: where one weight is all, the difference is exactly 0.
static void softmax_stats(float* scores, const float* grad, int64_t keys, int64_t queries,
                          SoftmaxStats stats) {
  for (int64_t i = 0; i < queries; i += W) {
    float* s = scores + i;
    const vf top = top_of(s, keys, set1(NO_TOP));
    vf sum = zero(), dot = zero();
    for (int64_t j = 0; j < keys; ++j) {
      const vf e = exp2v(sub(load(s + j * BLOCK), top));
      store(s + j * BLOCK, e);
      sum = add(sum, e);
      dot = fma(e, load(grad + i + j * BLOCK), dot);
    }
    const vf inverse = inverse_of(sum);
    store(stats.top + i, top);
    store(stats.inverse + i, inverse);
    store(stats.mean + i, mul(dot, inverse));
  }
}

// scores <- 2^(scores - top), as above.
static void softmax_again(float* scores, int64_t keys, int64_t queries, SoftmaxStats stats) {
  for (int64_t i = 0; i < queries; i += W) {
    const vf top = load(stats.top + i);
    for (float* s = scores + i; s < scores + keys * BLOCK; s += BLOCK) store(s, exp2v(sub(load(s), top)));
  }
}

// scores <- weights = scores / their sum, d weights <- d scores = weights * (d weights - mean).
static void softmax_grads(float* scores, float* grad, int64_t keys, int64_t queries, SoftmaxStats stats) {
  for (int64_t i = 0; i < queries; i += W) {
    const vf inverse = load(stats.inverse + i), mean = load(stats.mean + i);
    for (int64_t j = i; j < keys * BLOCK; j += BLOCK) {
      const vf p = mul(load(scores + j), inverse);
      store(scores + j, p);
      store(grad + j, mul(p, sub(load(grad + j), mean)));
    }
  }
}

} // namespace jepa::JEPA_ISA
