#include "masks/random.h"

namespace jepa {

TorchGenerator::TorchGenerator(uint64_t seed) {
  state_ = {};
  state_.seed = seed;
  state_.seeded = state_.left = 1;
  uint32_t word = static_cast<uint32_t>(seed);
  for (uint32_t i = 0; i < N; ++i) {
    if (i > 0) word = 1812433253u * (word ^ (word >> 30)) + i;
    state_.words[i] = word;
  }
}

static uint64_t twisted(uint64_t word, uint64_t next, uint64_t ahead) {
  const uint64_t joined = (word & 0x80000000) | (next & 0x7FFFFFFF);
  return ahead ^ (joined >> 1) ^ (-(joined & 1) & 0x9908B0DF);
}

// In two loops with no remainder, which are vectorised.
void TorchGenerator::twist() {
  uint64_t* const w = state_.words;
  for (uint32_t i = 0; i < N - M; ++i) w[i] = twisted(w[i], w[i + 1], w[i + M]);
  for (uint32_t i = N - M; i < N - 1; ++i) w[i] = twisted(w[i], w[i + 1], w[i + M - N]);
  w[N - 1] = twisted(w[N - 1], w[0], w[M - 1]);
  state_.left = N;
  state_.next = 0;
}

} // namespace jepa
