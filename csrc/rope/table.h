// Cosines and sines, computed in fp64 and rounded once. Plain loops: the compiler makes vectors of them.
#pragma once
#include <cstdint>
#include <cstring>

namespace jepa::JEPA_ISA {

constexpr int64_t MOST_PAIRS = 128;

// Taylor's sums in u = x^2, the last term first: for |x| <= pi / 2 within 1e-13.
constexpr double SINE[] = {1. / 355687428096000,
                           -1. / 1307674368000,
                           1. / 6227020800,
                           -1. / 39916800,
                           1. / 362880,
                           -1. / 5040,
                           1. / 120,
                           -1. / 6,
                           1.};
constexpr double COSINE[] = {-1. / 6402373705728000,
                             1. / 20922789888000,
                             -1. / 87178291200,
                             1. / 479001600,
                             -1. / 3628800,
                             1. / 40320,
                             -1. / 720,
                             1. / 24,
                             -1. / 2,
                             1.};

template <int terms> static inline double sum_of(const double (&series)[terms], double u) {
  double sum = 0;
  for (int i = 0; i < terms; ++i) sum = sum * u + series[i];
  return sum;
}

// Half turns are taken off; pi is the sum of two numbers of which the first is short, so that its multiples
// are exact. No branches: several angles at a time.
constexpr float FAR = 1e6f;
static inline void near_turn(float angle, float& cos, float& sin) {
  constexpr double HIGH = 3.14159265346825122833, LOW = 1.21542010130123844986e-10;
  const double halves = __builtin_rint(angle * 0.31830988618379067154);
  const double odd = halves - 2 * __builtin_rint(halves / 2), sign = 1 - 2 * odd * odd;
  const double rest = angle - halves * HIGH - halves * LOW;
  cos = static_cast<float>(sign * sum_of(COSINE, rest * rest));
  sin = static_cast<float>(sign * rest * sum_of(SINE, rest * rest));
}

struct Angles {
  float at[MOST_PAIRS], cos[MOST_PAIRS], sin[MOST_PAIRS];
  int64_t count;
};

static void turn_angles(Angles& a) {
  float furthest = 0;
  for (int64_t i = 0; i < a.count; ++i) furthest = __builtin_fabsf(a.at[i]) < FAR ? furthest : FAR;
  if (furthest < FAR) {
    for (int64_t i = 0; i < a.count; ++i) near_turn(a.at[i], a.cos[i], a.sin[i]);
    return;
  }
  for (int64_t i = 0; i < a.count; ++i) { // NaN and infinity too
    a.cos[i] = static_cast<float>(__builtin_cos(a.at[i]));
    a.sin[i] = static_cast<float>(__builtin_sin(a.at[i]));
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
  Angles angles;
  angles.count = (p.pairs + 7) / 8 * 8; // whole vectors
  for (int64_t j = p.pairs; j < angles.count; ++j) angles.at[j] = 0;
  for (int64_t j = 0; j < p.pairs; ++j) angles.at[j] = position * p.frequencies[j];
  turn_angles(angles);
  for (int64_t j = 0; j < p.pairs; ++j) {
    const Channels at = channels_of(p.pairing, j, p.pairs);
    cosines[at.first] = cosines[at.second] = angles.cos[j];
    sines[at.first] = at.first_sign * angles.sin[j];
    sines[at.second] = at.second_sign * angles.sin[j];
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
