// Rows copied as bytes.
#pragma once
#include <cstdint>
#include <cstring>
#include <immintrin.h>

namespace jepa::JEPA_ISA {

// With what is read, past the last-level cache: stores that bypass it save reading the line they overwrite.
constexpr int64_t STREAM_BYTES = int64_t{8} << 20;

#if defined(__AVX512F__)
constexpr int64_t STREAM_STEP = 64;
static inline void stream_step(char* out, const char* in) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
}
static inline void stream_zeros(char* out) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_setzero_si512());
}
#else
constexpr int64_t STREAM_STEP = 32;
static inline void stream_step(char* out, const char* in) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
}
static inline void stream_zeros(char* out) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(out), _mm256_setzero_si256());
}
#endif

// Whether rows of `bytes` from `out` on can be streamed, and are worth it. Finish with _mm_sfence.
static inline bool worth_streaming(const void* out, int64_t rows, int64_t bytes) {
  return rows * bytes > STREAM_BYTES && bytes % STREAM_STEP == 0 &&
         reinterpret_cast<uintptr_t>(out) % STREAM_STEP == 0;
}

// later, next: rows that are copied after this one, or null. Rows are short, and the hardware's own prefetch
// stops at each one's end: a later one is asked for into L2, which has more lines under way than L1 can have,
// the next one, there by now, into L1.
static inline void copy_row(void* out, const void* in, int64_t bytes, bool stream,
                            const void* later = nullptr, const void* next = nullptr) {
  if (!stream) {
    std::memcpy(out, in, bytes);
    return;
  }
  constexpr int64_t LINE = 64;
  for (int64_t i = 0; i < bytes; i += STREAM_STEP) {
    if (later && i % LINE == 0) _mm_prefetch(static_cast<const char*>(later) + i, _MM_HINT_T1);
    if (next && i % LINE == 0) _mm_prefetch(static_cast<const char*>(next) + i, _MM_HINT_T0);
    stream_step(static_cast<char*>(out) + i, static_cast<const char*>(in) + i);
  }
}

static inline void clear_row(void* out, int64_t bytes, bool stream) {
  if (!stream) {
    std::memset(out, 0, bytes);
    return;
  }
  for (int64_t i = 0; i < bytes; i += STREAM_STEP) stream_zeros(static_cast<char*>(out) + i);
}

} // namespace jepa::JEPA_ISA
