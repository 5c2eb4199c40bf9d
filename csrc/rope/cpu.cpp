// Memory-bound: each row is read once and written once; a token's turns stay in the cache for all its heads.
#include "rope/rope.h"

#include "common/floats.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "rope/table.h"

namespace jepa::JEPA_ISA {

constexpr int64_t MOST_CHANNELS = 256;
constexpr int64_t WORTH_A_THREAD = 1 << 15; // elements

struct Turns {
  const float *cos, *sin;
  int64_t turning, width;
  bool back;
};

// In fp32: one fused multiply-add after a rounded product, as attention turns its rows.
static inline vf turned(vf x, vf partner, vf cos, vf sin) { return fma(x, cos, mul(partner, sin)); }

template <class T> static void turn_pairs(const T* x, const Turns& t, T* y) {
  // The transpose takes the sine of the partner.
  const auto sines = [&](vf sin) { return t.back ? swap_pairs(sin) : sin; };
  int64_t c = 0;
  for (; c + W <= t.turning; c += W) {
    const vf a = load(x + c);
    store(y + c, turned(a, swap_pairs(a), load(t.cos + c), sines(load(t.sin + c))));
  }
  for (; c < t.width; c += W) { // some channels turn, the rest stays
    const int n = t.width - c < W ? static_cast<int>(t.width - c) : W;
    const int turning = t.turning < c ? 0 : static_cast<int>(t.turning - c);
    const vf a = load(x + c, 1, n), cos = load(t.cos + c, turning), sin = load(t.sin + c, turning);
    store_first(y + c, select(first(turning), turned(a, swap_pairs(a), cos, sines(sin)), a), n);
  }
}

template <class T> static void turn_halves(const T* x, const Turns& t, T* y) {
  const int64_t half = t.turning / 2;
  const float* sin[2] = {t.sin + (t.back ? half : 0), t.sin + (t.back ? 0 : half)};
  for (int64_t c = 0; c < half; c += W) {
    const int n = half - c < W ? static_cast<int>(half - c) : W;
    const vf a = load(x + c, 1, n), b = load(x + half + c, 1, n);
    store_first(y + c, turned(a, b, load(t.cos + c, 1, n), load(sin[0] + c, 1, n)), n);
    store_first(y + half + c, turned(b, a, load(t.cos + half + c, 1, n), load(sin[1] + c, 1, n)), n);
  }
  std::memcpy(y + t.turning, x + t.turning, (t.width - t.turning) * sizeof(T));
}

template <class T> static const T* contiguous(const T* x, int64_t stride, int64_t width, T* copy) {
  if (stride == 1) return x;
  for (int64_t c = 0; c < width; ++c) copy[c] = x[c * stride];
  return copy;
}

// Heads first..last-1, counted over all tokens.
template <class T>
static void turn_heads(const RopeParams& p, const RopeRows& r, int64_t first, int64_t last) {
  T copy[MOST_CHANNELS];
  for (int64_t i = first; i < last;) {
    const int64_t token = i / r.heads, b = token / r.tokens, t = token % r.tokens;
    const float* cos = r.turns + b * r.turns_batch + t * r.turns_token;
    const Turns turns{cos, cos + p.turning, p.turning, p.width, p.back};
    const T* row = static_cast<const T*>(r.x) + b * r.x_batch + t * r.x_token;
    for (int64_t head = i % r.heads; head < r.heads && i < last; ++head, ++i) {
      const T* x = contiguous(row + head * r.x_head, r.x_channel, p.width, copy);
      T* y = static_cast<T*>(r.y) + i * p.width;
      if (p.half)
        turn_halves(x, turns, y);
      else
        turn_pairs(x, turns, y);
    }
  }
}

// Threads share the heads of queries and keys as one long axis.
void rope_cpu(const RopeParams& p) {
  int64_t count[2], total = 0;
  for (int i = 0; i < 2; ++i) total += count[i] = p.batch * p.rows[i].tokens * p.rows[i].heads;
  const int threads = total * p.width < WORTH_A_THREAD ? 1 : p.threads;
  with_float(p.dtype, [&](auto x) {
    parallel_for(total, threads, [&](int64_t begin, int64_t end) {
      const int64_t middle = begin > count[0] ? begin : end < count[0] ? end : count[0];
      turn_heads<decltype(x)>(p, p.rows[0], begin, middle);
      turn_heads<decltype(x)>(p, p.rows[1], middle - count[0], end - count[0]);
    });
  });
}

void rope_turns_cpu(const RopeTurnsParams& p) {
  const int64_t rows = p.batch * p.tokens, row = 2 * p.axes * 2 * p.pairs;
  const int threads = rows * row < WORTH_A_THREAD ? 1 : p.threads;
  parallel_for(rows, threads, [&](int64_t begin, int64_t end) {
    const float* before = nullptr;
    for (int64_t i = begin; i < end; ++i) {
      const float* positions = p.positions + i / p.tokens * p.stride_batch + i % p.tokens * p.stride_token;
      write_row(p, positions, before, p.out + i * row);
      before = positions;
    }
  });
}

} // namespace jepa::JEPA_ISA
