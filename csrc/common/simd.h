// The vector layer: W floats in a register, loads and stores of every element type, fp32 arithmetic.
// Everything is static and inside the ISA's own namespace: the levels never share a function.
#pragma once
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "common/dtype.h"

namespace jepa::JEPA_ISA {

#if defined(__AVX512F__)

using vf = __m512;
constexpr int W = 16;
using mask = __mmask16;

static inline mask first(int n) { return static_cast<mask>((1u << n) - 1); } // lanes 0..n-1, n <= W
static inline vf zero() { return _mm512_setzero_ps(); }
static inline vf set1(float x) { return _mm512_set1_ps(x); }
static inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vsqrt(vf a) { return _mm512_sqrt_ps(a); }
static inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); } // c - a b
static inline vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vabs(vf a) { return _mm512_abs_ps(a); }
static inline mask less(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline vf select(mask m, vf yes, vf no) { return _mm512_mask_blend_ps(m, no, yes); }
static inline vf swap_pairs(vf a) { return _mm512_permute_ps(a, 0xB1); }
static inline float hmax(vf a) { return _mm512_reduce_max_ps(a); }
static inline float hsum(vf a) { return _mm512_reduce_add_ps(a); }

static inline __m512i widen(__m256i bits) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16); }

static inline vf load(const float* p) { return _mm512_loadu_ps(p); }
static inline vf load(const bf16* p) {
  return _mm512_castsi512_ps(widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
static inline vf load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline vf load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
static inline vf load(const bf16* p, int n) {
  return _mm512_castsi512_ps(widen(_mm256_maskz_loadu_epi16(first(n), p)));
}
static inline vf load(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
static inline vf from_bytes(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); }
static inline vf load(const uint8_t* p) {
  return from_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline vf load(const uint8_t* p, int n) { return from_bytes(_mm_maskz_loadu_epi8(first(n), p)); }

// Round to nearest even; NaN stays NaN. AVX512_BF16's own instruction takes denormals for 0: keeping them
// costs a quarter of assemble_tokens' time in the cache.
static inline __m256i to_bf16(vf x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const mask nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7FC00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
}
static inline __m256i to_f16(vf x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

static inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
static inline void store(bf16* p, vf x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(x)); }
static inline void store(f16* p, vf x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(x)); }
static inline void store(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
static inline void store(bf16* p, vf x, int n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(x)); }
static inline void store(f16* p, vf x, int n) { _mm256_mask_storeu_epi16(p, first(n), to_f16(x)); }

// The float whose exponent bits are the last bits of x, and which has no others.
static inline vf as_exponent(vf x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23));
}
// The whole part of log2 x, x > 0 and no denormal.
static inline vf exponent(vf x) { return _mm512_getexp_ps(x); }
// Lanes whose bit i is set, for select.
static inline mask bit(vf x, int i) {
  return _mm512_test_epi32_mask(_mm512_castps_si512(x), _mm512_set1_epi32(1 << i));
}

// Past the cache, to aligned addresses; finish with _mm_sfence.
static inline void stream(float* p, vf x) { _mm512_stream_ps(p, x); }
static inline void stream(bf16* p, vf x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16(x)); }
static inline void stream(f16* p, vf x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_f16(x)); }

#else // AVX2 and FMA

using vf = __m256;
constexpr int W = 8;
using mask = __m256;

static inline __m256i lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline mask first(int n) { return _mm256_castsi256_ps(lanes(n)); }
static inline vf zero() { return _mm256_setzero_ps(); }
static inline vf set1(float x) { return _mm256_set1_ps(x); }
static inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf vsqrt(vf a) { return _mm256_sqrt_ps(a); }
static inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
static inline vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vabs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
static inline mask less(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline vf select(mask m, vf yes, vf no) { return _mm256_blendv_ps(no, yes, m); }
static inline vf swap_pairs(vf a) { return _mm256_permute_ps(a, 0xB1); }
static inline float hmax(vf a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
static inline float hsum(vf a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

static inline vf load(const float* p) { return _mm256_loadu_ps(p); }
static inline vf load(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
static inline vf load(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline vf load(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
static inline vf load(const float* p, int n) { return _mm256_maskload_ps(p, lanes(n)); }
// AVX2 has no masked access to narrower elements: partial rows go through the stack.
template <class T> static inline vf load(const T* p, int n) {
  alignas(16) T padded[W] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

static inline __m128i to_bf16(vf x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
}
static inline __m128i to_f16(vf x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

static inline void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
static inline void store(bf16* p, vf x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(x)); }
static inline void store(f16* p, vf x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16(x)); }
static inline void store(float* p, vf x, int n) { _mm256_maskstore_ps(p, lanes(n), x); }
template <class T> static inline void store(T* p, vf x, int n) {
  alignas(16) T padded[W];
  store(padded, x);
  std::memcpy(p, padded, n * sizeof(T));
}

static inline vf as_exponent(vf x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23));
}
static inline vf exponent(vf x) {
  return sub(_mm256_cvtepi32_ps(_mm256_srli_epi32(_mm256_castps_si256(x), 23)), set1(127.f));
}
static inline mask bit(vf x, int i) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 31 - i));
}

static inline void stream(float* p, vf x) { _mm256_stream_ps(p, x); }
static inline void stream(bf16* p, vf x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16(x)); }
static inline void stream(f16* p, vf x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_f16(x)); }

#endif

// Sums in double, in halves of eight lanes.
using vd = __m256d;
static inline vd dzero() { return _mm256_setzero_pd(); }
static inline double hsum(vd a) {
  const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}
static inline void add_squares(__m256 x, vd (&sums)[2]) {
  const vd low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)),
           high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
  sums[0] = _mm256_fmadd_pd(low, low, sums[0]);
  sums[1] = _mm256_fmadd_pd(high, high, sums[1]);
}
#if defined(__AVX512F__)
static inline void add_squares(vf x, vd (&sums)[2]) {
  add_squares(_mm512_castps512_ps256(x), sums);
  add_squares(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)), sums);
}
#endif

// Lanes that a register holds of `left` elements.
static inline int part(int64_t left) { return left < W ? static_cast<int>(left) : W; }

// n <= W elements, `stride` apart.
template <class T> static inline vf load(const T* p, int64_t stride, int n) {
  if (stride == 1) return n == W ? load(p) : load(p, n);
  alignas(64) T values[W] = {};
  for (int i = 0; i < n; ++i) values[i] = p[i * stride];
  return load(values);
}

// Full registers need no mask.
template <class T> static inline void store_first(T* p, vf x, int n) {
  if (n == W)
    store(p, x);
  else
    store(p, x, n);
}

// As a tensor of T would hold it.
static inline vf rounded(float, vf x) { return x; }
static inline vf rounded(bf16, vf x) {
  bf16 held[W];
  store(held, x);
  return load(held);
}
static inline vf rounded(f16, vf x) {
  f16 held[W];
  store(held, x);
  return load(held);
}

// Added to a whole number n, makes the last bits those of n + 127, the exponent of 2^n: the last bit stands
// for 1.
constexpr float MAGIC = 0x1.8p23f + 127.f;

// 2^x for x <= 0 (softmax weights), relative error under 2e-7; below 2^-126 the result is 0. NaN stays NaN:
// vmax hands on its second operand.
static inline vf exp2v(vf x) {
  x = vmax(set1(-127.f), x);
  const vf whole = add(x, set1(MAGIC)), t = sub(x, sub(whole, set1(MAGIC))); // t in [-0.5, 0.5]
  vf y = set1(1.32647272e-3f);
  y = fma(y, t, set1(9.67151269e-3f));
  y = fma(y, t, set1(5.55073374e-2f));
  y = fma(y, t, set1(2.40222421e-1f));
  y = fma(y, t, set1(6.93146978e-1f));
  y = fma(y, t, set1(1.f));
  return mul(y, as_exponent(whole)); // the biased exponent is in the last bits of `whole`
}

// log2 of x >= 0 that is no denormal, relative error under 2e-7 of the larger of result and 1; NaN stays NaN.
static inline vf log2v(vf x) {
  const vf whole = exponent(mul(x, set1(1.41421356f)));
  const vf m = mul(x, as_exponent(sub(set1(MAGIC), whole)));             // in [sqrt(1/2), sqrt(2)]
  const vf t = div(sub(m, set1(1.f)), add(m, set1(1.f))), u = mul(t, t); // log2 m = 2 / ln 2 * artanh t
  vf y = set1(0.32059890f);
  y = fma(y, u, set1(0.41219858f));
  y = fma(y, u, set1(0.57707802f));
  y = fma(y, u, set1(0.96179669f));
  y = fma(y, u, set1(2.88539008f));
  y = fma(y, t, whole);
  const vf least = set1(-__builtin_inff());
  return add(select(less(zero(), x), y, least), sub(x, x));
}

} // namespace jepa::JEPA_ISA
