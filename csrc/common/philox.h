// A counter-based generator: four words that are a function of a counter and a key alone.
#pragma once
#include <cstdint>

namespace jepa {

struct Words {
  uint32_t x[4];
};

// Philox4x32-10 of Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
static inline Words philox(Words counter, uint64_t key) {
  uint32_t* const c = counter.x;
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ c[1] ^ key0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ c[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

} // namespace jepa
