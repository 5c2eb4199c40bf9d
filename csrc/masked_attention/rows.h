// Moving rows between the caller's tensors and fp32 scratch.
#pragma once
#include "common/simd.h"
#include "common/transpose.h"

namespace jepa::JEPA_ISA {

// Elements of type T of one sequence, from one row and head on.
template <class T> struct View {
  T* data;
  int64_t row, head, channel;
};

// Long rows lie an odd number of cache lines apart, so that equal columns of many rows spread over all cache
// sets.
static int64_t scratch_row(int64_t width) {
  return width <= 32 ? (width + W - 1) / W * W : ((width + 15) / 16 | 1) * 16;
}

template <class T> static void read_row(const T* in, int64_t channel, int64_t width, float* out) {
  if (channel == 1) {
    int64_t c = 0;
    for (; c + W <= width; c += W) store(out + c, load(in + c));
    if (c < width) store(out + c, load(in + c, static_cast<int>(width - c)));
    return;
  }
  T values[128 + W] = {};
  for (int64_t c = 0; c < width; ++c) values[c] = in[c * channel];
  for (int64_t c = 0; c < width; c += W) store(out + c, load(values + c));
}

// The turns of a row and those behind it; cos null: none.
struct Turns {
  const float* cos;
  int64_t row, channels;
  bool half;
};

// other[c] = x[partner of c] for c < channels; both have room for whole registers.
static void partners(const float* x, int64_t channels, bool half, float* other) {
  if (half) {
    std::memcpy(other, x + channels / 2, channels / 2 * sizeof(float));
    std::memcpy(other + channels / 2, x, channels / 2 * sizeof(float));
  } else {
    for (int64_t c = 0; c < channels; c += W) store(other + c, swap_pairs(load(x + c)));
  }
}

// x <- the turned row, rounded as a tensor of T would hold it.
template <class T> static void turn(float* x, const float* cos, int64_t channels, bool half) {
  float other[128 + W];
  partners(x, channels, half, other);
  for (int64_t c = 0; c < channels; c += W) {
    const int n = channels - c < W ? static_cast<int>(channels - c) : W;
    const vf sine = load(cos + channels + c, 1, n), cosine = load(cos + c, 1, n);
    store_first(x + c, rounded(T{}, fma(load(x + c), cosine, mul(load(other + c), sine))), n);
  }
}

// y <- the turned row x of neighbours, as `turn` has it: read and turned at once, whole registers unmasked.
template <class T>
static void read_turned(const T* x, const float* cos, int64_t channels, int64_t width, float* y) {
  const auto turned = [&](vf a, vf cosine, vf sine) {
    return rounded(T{}, fma(a, cosine, mul(swap_pairs(a), sine)));
  };
  const float* sin = cos + channels;
  int64_t c = 0;
  for (; c + W <= channels; c += W) store(y + c, turned(load(x + c), load(cos + c), load(sin + c)));
  for (; c < width; c += W) { // some channels turn, the rest stays
    const int n = width - c < W ? static_cast<int>(width - c) : W;
    const int turning = channels < c ? 0 : static_cast<int>(channels - c);
    const vf a = load(x + c, 1, n);
    store(y + c, select(first(turning), turned(a, load(cos + c, turning), load(sin + c, turning)), a));
  }
}

// The gradient's way back: x <- the transposed turn, not rounded.
static void turn_back(float* x, const float* cos, int64_t channels, bool half) {
  float sines[128 + W] = {}, other[128 + W];
  for (int64_t c = 0; c < channels; ++c) sines[c] = x[c] * cos[channels + c];
  partners(sines, channels, half, other);
  for (int64_t c = 0; c < channels; c += W) {
    const int n = channels - c < W ? static_cast<int>(channels - c) : W;
    store_first(x + c, fma(load(x + c), load(cos + c, 1, n), load(other + c)), n);
  }
}

// Rows lie pages apart, where the hardware does not look ahead.
constexpr int64_t AHEAD = 8;

// Rows of some heads into scratch, one head `out_head` behind the other.
template <class T>
static void read_rows(View<const T> in, const Turns& turns, int64_t rows, int64_t heads, int64_t width,
                      float* out, int64_t out_head) {
  const int64_t out_row = scratch_row(width);
  for (int64_t i = 0; i < rows; ++i, out += out_row) {
    for (int64_t h = 0; h < heads; ++h) {
      const T *x = in.data + i * in.row + h * in.head, *ahead = i + AHEAD < rows ? x + AHEAD * in.row : x;
      for (int64_t c = 0; c < width; c += 64 / int64_t(sizeof(T)))
        _mm_prefetch(reinterpret_cast<const char*>(ahead + c), _MM_HINT_T0);
      float* y = out + h * out_head;
      const float* cos = turns.cos ? turns.cos + i * turns.row : nullptr;
      if (cos && !turns.half && in.channel == 1) {
        read_turned(x, cos, turns.channels, width, y);
        continue;
      }
      read_row(x, in.channel, width, y);
      if (cos) turn<T>(y, cos, turns.channels, turns.half);
    }
  }
}

static void clear_rows(float* x, int64_t rows, int64_t width) {
  std::memset(x, 0, rows * scratch_row(width) * sizeof(float));
}

static void scale_rows(float* x, const float* factor, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i, x += scratch_row(width)) {
    const vf f = set1(factor[i]);
    for (int64_t c = 0; c < width; c += W) store(x + c, mul(f, load(x + c)));
  }
}

// Rows times their factors, 0 where the factor is 0.
template <class T>
static void write_rows(const float* in, const float* factor, int64_t rows, int64_t width, View<T> out) {
  for (int64_t i = 0; i < rows; ++i, in += scratch_row(width)) {
    const vf f = set1(factor[i]);
    T* y = out.data + i * out.row;
    for (int64_t c = 0; c < width; c += W) {
      const vf x = factor[i] == 0 ? zero() : mul(f, load(in + c));
      store_first(y + c, x, width - c < W ? static_cast<int>(width - c) : W);
    }
  }
}

// Gradients of turned rows, times one factor; `in` is spoilt.
template <class T>
static void write_grads(float* in, float factor, const Turns& turns, int64_t rows, int64_t width,
                        View<T> out) {
  for (int64_t i = 0; i < rows; ++i, in += scratch_row(width)) {
    if (turns.cos) turn_back(in, turns.cos + i * turns.row, turns.channels, turns.half);
    write_rows(in, &factor, 1, width, View<T>{out.data + i * out.row, 0, 0, 1});
  }
}

} // namespace jepa::JEPA_ISA
