// Directions of slices: numbers of a counter-based generator, made normal, over the norm of their slice.
#pragma once
#include <cmath>
#include <cstring>

#include "common/simd.h"

namespace jepa::JEPA_ISA {

constexpr uint64_t SALT = uint64_t{0x53494752} << 32; // apart from the numbers that masks are drawn from
constexpr int NUMBERS = 4;                            // of one block of the generator
constexpr int LANES = 32;                             // blocks at a time, in loops that become vectors

// 2 floor(x) + 1. std::floor would keep the loop around it from becoming one of vectors.
static inline int32_t odd_floor(float x) {
  const int32_t towards_zero = static_cast<int32_t>(x);
  return 2 * towards_zero + (static_cast<float>(towards_zero) > x ? -1 : 1);
}

// Two standard normal numbers from two words, by Box and Muller's transform, on the grid of odd multiples of
// 2^-17. Every operation is rounded on its own, so that these are the same bits everywhere.
static void normals(const uint32_t* first, const uint32_t* second, int32_t* one, int32_t* other) {
  float u[LANES], m[LANES]; // numbers and their bits: only through memory do these loops become vectors
  int32_t bits[LANES], exponent[LANES];
  for (int i = 0; i < LANES; ++i) u[i] = static_cast<float>(static_cast<int32_t>((first[i] >> 8) + 1));
  std::memcpy(bits, u, sizeof u);
  for (int i = 0; i < LANES; ++i) {
    exponent[i] = (bits[i] - 0x3F3504F3) >> 23;
    bits[i] -= exponent[i] * (1 << 23);
  }
  std::memcpy(m, bits, sizeof m); // in [sqrt(1/2), sqrt(2)); u = m 2^exponent, in [1, 2^24]
  for (int i = 0; i < LANES; ++i) {
    const float t = (m[i] - 1.f) / (m[i] + 1.f), q = t * t;
    const float log_m =
        (((q * float(2. / 9) + float(2. / 7)) * q + float(2. / 5)) * q + float(2. / 3)) * q * t + 2.f * t;
    const float radius = std::sqrt(static_cast<float>(24 - exponent[i]) * 0x1.62e430p0f - 2.f * log_m);
    const float angle = (static_cast<float>(static_cast<int32_t>(second[i] >> 8)) + 0.5f) * 0x1.921fb6p-25f;
    const float s = angle * angle;
    const float sine = ((s * float(-1. / 5040) + float(1. / 120)) * s + float(-1. / 6)) * s * angle + angle;
    const float cosine =
        (((s * float(1. / 40320) + float(-1. / 720)) * s + float(1. / 24)) * s + float(-1. / 2)) * s + 1.f;
    const bool swapped = second[i] & 1;
    const float x = swapped ? sine : cosine, y = swapped ? cosine : sine; // one of eight octants
    one[i] = odd_floor((second[i] & 2 ? -x : x) * radius * 65536.f);
    other[i] = odd_floor((second[i] & 4 ? -y : y) * radius * 65536.f);
  }
}

// Words in lanes of 64 bits, whose upper halves mean nothing: products take the lower ones.
#if defined(__AVX512F__)
using words = __m512i;
static inline words set1_words(uint32_t x) { return _mm512_set1_epi64(x); }
static inline words count_from(uint32_t x) {
  return _mm512_add_epi64(set1_words(x), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline words product(words a, uint32_t b) { return _mm512_mul_epu32(a, set1_words(b)); }
static inline words upper_xor(words a, words b, words c) {
  return _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), b, c, 0x96);
}
static inline void store_words(uint32_t* p, words a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(a));
}
#else
using words = __m256i;
static inline words set1_words(uint32_t x) { return _mm256_set1_epi64x(x); }
static inline words count_from(uint32_t x) {
  return _mm256_add_epi64(set1_words(x), _mm256_setr_epi64x(0, 1, 2, 3));
}
static inline words product(words a, uint32_t b) { return _mm256_mul_epu32(a, set1_words(b)); }
static inline words upper_xor(words a, words b, words c) {
  return _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(a, 32), b), c);
}
static inline void store_words(uint32_t* p, words a) {
  a = _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(a));
}
#endif

// Philox4x32-10, as in common/philox.h, of LANES counters from `block` on.
static void draw_words(uint32_t block, uint32_t number, uint64_t step, uint64_t key,
                       uint32_t (&word)[NUMBERS][LANES]) {
  constexpr int SIDE = W / 2; // counters side by side
  for (int lane = 0; lane < LANES; lane += SIDE) {
    words a = count_from(block + lane), b = set1_words(number);
    words c = set1_words(static_cast<uint32_t>(step)), d = set1_words(static_cast<uint32_t>(step >> 32));
    uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
      const words left = product(a, 0xD2511F53), right = product(c, 0xCD9E8D57);
      a = upper_xor(right, b, set1_words(key0));
      b = right;
      c = upper_xor(left, d, set1_words(key1));
      d = left;
    }
    store_words(word[0] + lane, a);
    store_words(word[1] + lane, b);
    store_words(word[2] + lane, c);
    store_words(word[3] + lane, d);
  }
}

// The numbers of slice `number` from element `first` on, LANES blocks of them.
static void draw(uint32_t first, uint32_t number, uint64_t step, uint64_t seed, int32_t* grid) {
  uint32_t word[NUMBERS][LANES];
  draw_words(first / NUMBERS, number, step, seed ^ SALT, word);
  int32_t drawn[NUMBERS][LANES];
  for (int i = 0; i < NUMBERS; i += 2) normals(word[i], word[i + 1], drawn[i], drawn[i + 1]);
  for (int lane = 0; lane < LANES; ++lane)
    for (int i = 0; i < NUMBERS; ++i) grid[lane * NUMBERS + i] = drawn[i][lane];
}

// Draws slices of one width. On the grid the sum of squares is a whole number: exact in any order.
class Directions {
public:
  Directions(int64_t width, uint64_t step, uint64_t seed)
      : width_(width), step_(step), seed_(seed), grid_(new int32_t[(width + DRAWN - 1) / DRAWN * DRAWN]) {}
  Directions(const Directions&) = delete;
  Directions& operator=(const Directions&) = delete;
  ~Directions() { delete[] grid_; }

  void operator()(int64_t number, float* out) const {
    for (int64_t e = 0; e < width_; e += DRAWN)
      draw(static_cast<uint32_t>(e), static_cast<uint32_t>(number), step_, seed_, grid_ + e);
    int64_t squares = 0;
    for (int64_t e = 0; e < width_; ++e) squares += int64_t{grid_[e]} * grid_[e];
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(squares)));
    for (int64_t e = 0; e < width_; ++e) out[e] = static_cast<float>(grid_[e]) * scale;
  }

private:
  static constexpr int64_t DRAWN = NUMBERS * LANES;
  int64_t width_;
  uint64_t step_, seed_;
  int32_t* grid_;
};

} // namespace jepa::JEPA_ISA
