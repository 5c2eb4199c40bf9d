// The generators that masks are drawn from.
#pragma once
#include <cstdint>
#include <cstring>

#include "../common/philox.h"

namespace jepa {

class Random {
public:
  virtual ~Random() = default;
  virtual double uniform() = 0;             // in [0, 1)
  virtual int64_t below(int64_t range) = 0; // in [0, range), for a range in [1, 2^32)
};

// Every batch has a stream of its own: word i is a function of (seed, step, stream, i) alone.
class Philox final : public Random {
public:
  Philox(uint64_t seed, uint64_t step, uint32_t stream) : seed_(seed), step_(step), stream_(stream) {}

  double uniform() override { return word() * 0x1p-32; }

  int64_t below(int64_t range) override {
    const uint32_t n = static_cast<uint32_t>(range);
    const uint32_t surplus = -n % n; // 2^32 mod n words would make the first numbers likelier than the others
    uint32_t drawn = word();
    while (drawn < surplus) drawn = word();
    return drawn % n;
  }

private:
  uint32_t word() {
    const uint32_t place = drawn_++ % 4;
    if (place == 0)
      block_ = philox({{static_cast<uint32_t>(drawn_ / 4), stream_, static_cast<uint32_t>(step_),
                        static_cast<uint32_t>(step_ >> 32)}},
                      seed_);
    return block_.x[place];
  }

  uint64_t seed_, step_, drawn_ = 0;
  uint32_t stream_;
  Words block_{};
};

// torch's CPU generator: the Mersenne Twister of Matsumoto and Nishimura (1998), torch.rand and
// torch.randint.
class TorchGenerator final : public Random {
public:
  // What torch.get_rng_state() gives. Only the fields that numbers are drawn from change; the rest, a normal
  // number kept for the next call, passes through.
  struct State {
    uint64_t seed;
    int32_t left; // words until the next twist, counting the one about to be drawn
    int32_t seeded;
    uint64_t next;
    uint64_t words[624];
    unsigned char normal[40];
  };
  static_assert(sizeof(State) == 5056);

  explicit TorchGenerator(const State& state) : state_(state) {}

  explicit TorchGenerator(uint64_t seed); // torch.manual_seed

  const State& state() const { return state_; }

  double uniform() override { return (word() & 0xFFFFFF) * 0x1p-24; } // torch.rand(1), in float32
  int64_t below(int64_t range) override { return word() % range; }    // torch.randint(0, range, (1,))

private:
  static constexpr uint32_t N = 624, M = 397;

  uint32_t word() {
    if (--state_.left <= 0 || state_.next >= N)
      twist(); // a state made by hand reads nothing beyond the words
    uint32_t y = static_cast<uint32_t>(state_.words[state_.next++]);
    y ^= y >> 11;
    y ^= (y << 7) & 0x9D2C5680;
    y ^= (y << 15) & 0xEFC60000;
    return y ^ (y >> 18);
  }

  void twist();

  State state_;
};

} // namespace jepa
