// Cosines and sines, computed in fp64 and rounded once. Plain loops: the compiler makes vectors of them.
#pragma once
#include <cmath>
#include <cstdint>

namespace jepa::JEPA_ISA {

constexpr int64_t MOST_PAIRS = 128;

// Of |x| <= pi / 4: Taylor's sums, to 1e-11.
static inline double sine(double x) {
  const double u = x * x;
  return x + x * u * (-1. / 6 + u * (1. / 120 + u * (-1. / 5040 + u * (1. / 362880 + u * (-1. / 39916800)))));
}
static inline double cosine(double x) {
  const double u = x * x;
  return 1 + u * (-1. / 2 +
                  u * (1. / 24 + u * (-1. / 720 + u * (1. / 40320 + u * (-1. / 3628800 + u / 479001600)))));
}

// Of count angles below FAR: quarter turns are taken off, pi / 2 being the sum of two numbers of which the
// first is short, so that its multiples are exact.
constexpr float FAR = 1e6f;
static void near_turns(const float* angles, int64_t count, float* cos, float* sin) {
  constexpr double HIGH = 1.57079632673412561417, LOW = 6.07710050650619224932e-11;
  for (int64_t i = 0; i < count; ++i) {
    const double quarters = __builtin_rint(angles[i] * 0.63661977236758134308);
    const double rest = angles[i] - quarters * HIGH - quarters * LOW;
    const double s = sine(rest), c = cosine(rest);
    const int q = static_cast<int>(quarters);
    const double a = q & 1 ? s : c, b = q & 1 ? c : s;
    cos[i] = static_cast<float>((q + 1) & 2 ? -a : a);
    sin[i] = static_cast<float>(q & 2 ? -b : b);
  }
}

static void turns_of(const float* angles, int64_t count, float* cos, float* sin) {
  bool near = true;
  for (int64_t i = 0; i < count; ++i) near &= __builtin_fabsf(angles[i]) < FAR;
  if (near) return near_turns(angles, count, cos, sin);
  for (int64_t i = 0; i < count; ++i) { // NaN and infinity too
    cos[i] = static_cast<float>(__builtin_cos(angles[i]));
    sin[i] = static_cast<float>(__builtin_sin(angles[i]));
  }
}

// The two channels of an axis that have pair j's frequency, and the sign of their sines.
struct Channels {
  int64_t first, second;
  float first_sign, second_sign;
};

static inline Channels channels_of(RopePairing pairing, int64_t j, int64_t pairs) {
  if (pairing == RopePairing::interleaved) return {2 * j, 2 * j + 1, -1, 1};
  if (pairing == RopePairing::half) return {j, j + pairs, -1, 1};
  return {j, j + pairs, j % 2 ? 1.f : -1.f, (j + pairs) % 2 ? 1.f : -1.f};
}

// One axis of one token.
static void write_axis(const RopeTurnsParams& p, float position, float* cosines, float* sines) {
  float angles[MOST_PAIRS], cos[MOST_PAIRS], sin[MOST_PAIRS];
  for (int64_t j = 0; j < p.pairs; ++j) angles[j] = position * p.frequencies[j];
  turns_of(angles, p.pairs, cos, sin);
  for (int64_t j = 0; j < p.pairs; ++j) {
    const Channels at = channels_of(p.pairing, j, p.pairs);
    cosines[at.first] = cosines[at.second] = cos[j];
    sines[at.first] = at.first_sign * sin[j];
    sines[at.second] = at.second_sign * sin[j];
  }
}

// Neighbours mostly share their frame and row: what is equal is copied.
static void write_row(const RopeTurnsParams& p, const float* positions, const float* before, float* row) {
  const int64_t channels = 2 * p.pairs, turning = p.axes * channels;
  for (int64_t axis = 0; axis < p.axes; ++axis) {
    const float position = positions[axis * p.stride_axis];
    float* cosines = row + axis * channels;
    if (before && before[axis * p.stride_axis] == position) {
      std::memcpy(cosines, cosines - 2 * turning, channels * sizeof(float));
      std::memcpy(cosines + turning, cosines - turning, channels * sizeof(float));
    } else {
      write_axis(p, position, cosines, cosines + turning);
    }
  }
}

} // namespace jepa::JEPA_ISA
