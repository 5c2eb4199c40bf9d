// Loops with nothing in the way of the memory system or of the multiply-add units.
#include "peaks/peaks.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace jepa::JEPA_ISA {

static constexpr int UNITS = 12; // independent chains: more than latency x issue width, fewer than registers

static void copy(const float* a, float* b, int64_t n, bool streamed) {
  if (streamed) {
    for (int64_t i = 0; i < n; i += W) stream(b + i, load(a + i));
    _mm_sfence();
  } else {
    for (int64_t i = 0; i < n; i += W) store(b + i, load(a + i));
  }
}

static float read(const float* a, int64_t n) {
  vf sum[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i < n; i += 4 * W)
    for (int j = 0; j < 4; ++j) sum[j] = add(sum[j], load(a + i + j * W));
  return hsum(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

static void read_modify_write(float* a, int64_t n) {
  const vf factor = set1(0.999f), step = set1(1e-3f);
  for (int64_t i = 0; i < n; i += W) store(a + i, fma(factor, load(a + i), step));
}

static float fma_f32(int64_t rounds) {
  vf sum[UNITS];
  for (int j = 0; j < UNITS; ++j) sum[j] = set1(0.1f * static_cast<float>(j));
  const vf factor = set1(0.5f), step = set1(0.25f);
  for (int64_t i = 0; i < rounds; ++i)
    for (int j = 0; j < UNITS; ++j) sum[j] = fma(sum[j], factor, step);
  for (int j = 1; j < UNITS; ++j) sum[0] = add(sum[0], sum[j]);
  return hsum(sum[0]);
}

#if defined(__AVX512BF16__)
static float fma_bf16(int64_t rounds) {
  __m512 sum[UNITS];
  for (int j = 0; j < UNITS; ++j) sum[j] = set1(0.1f * static_cast<float>(j));
  const __m512bh a = _mm512_cvtne2ps_pbh(set1(0.5f), set1(0.25f));
  const __m512bh b = _mm512_cvtne2ps_pbh(set1(1e-3f), set1(-1e-3f));
  for (int64_t i = 0; i < rounds; ++i)
    for (int j = 0; j < UNITS; ++j) sum[j] = _mm512_dpbf16_ps(sum[j], a, b);
  for (int j = 1; j < UNITS; ++j) sum[0] = add(sum[0], sum[j]);
  return hsum(sum[0]);
}
constexpr int BF16_OPERATIONS = 4 * W; // a pair of products and sums in each fp32 lane
#else
// Without bf16 instructions, bf16 kernels multiply in fp32.
static float fma_bf16(int64_t rounds) { return fma_f32(rounds); }
constexpr int BF16_OPERATIONS = 2 * W;
#endif

static void compute(const PeaksParams& p) {
  const bool low = p.kind == Peak::fma_bf16;
  parallel_for(p.threads, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) p.sink[thread] = low ? fma_bf16(p.n) : fma_f32(p.n);
  });
  *p.flops = static_cast<double>(p.n) * UNITS * (low ? BF16_OPERATIONS : 2 * W) * p.threads;
}

static constexpr int64_t BLOCK = 1024; // floats; every share is a multiple of it, so that no loop has a tail

void peaks_cpu(const PeaksParams& p) {
  if (p.kind == Peak::fma_f32 || p.kind == Peak::fma_bf16) return compute(p);
  parallel_for(p.n / BLOCK, p.threads, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * BLOCK, n = (end - begin) * BLOCK;
    switch (p.kind) {
    case Peak::copy:
      copy(p.a + from, p.b + from, n, false);
      break;
    case Peak::copy_streamed:
      copy(p.a + from, p.b + from, n, true);
      break;
    case Peak::rmw:
      read_modify_write(p.a + from, n);
      break;
    default:
      p.sink[thread_rank()] = read(p.a + from, n);
    }
  });
}

} // namespace jepa::JEPA_ISA
