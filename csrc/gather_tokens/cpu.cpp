// Memory-bound: forward copies each kept row once; backward writes each token once, summing the rows that
// chose it in row order, in fp32, so that the result does not depend on threads.
#include "gather_tokens/gather_tokens.h"

#include "common/copy.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/sort_rows.h"

namespace jepa::JEPA_ISA {

// The run that holds a row; `sequences` for rows past the last run.
static int64_t run_of(const KeptRows& at, int64_t row) {
  if (!at.cu_seqlens) return at.run_length ? row / at.run_length : at.sequences;
  int64_t low = 0, high = at.sequences;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (at.cu_seqlens[middle + 1] <= row)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

static void copy_strided(char* out, const char* in, int64_t channels, int64_t stride, int size) {
  for (int64_t c = 0; c < channels; ++c) std::memcpy(out + c * size, in + c * stride * size, size);
}

// The token that a row copies, or null; moves run on to the row's.
static const char* source_of(const GatherTokensForwardParams& p, int64_t row, int64_t& run) {
  while (run < p.at.sequences && begin_of(p.at, run + 1) <= row) ++run;
  const int64_t id = run < p.at.sequences ? p.at.ids[row] : -1;
  if (id < 0 || id >= p.at.count) return nullptr;
  const int64_t offset = run % p.at.batch * p.stride_image + id * p.stride_token;
  return static_cast<const char*>(p.x) + offset * p.element_size;
}

void gather_tokens_forward_cpu(const GatherTokensForwardParams& p) {
  const int64_t bytes = p.channels * p.element_size;
  const bool streamed = p.stride_channel == 1 && worth_streaming(p.out, p.at.rows, bytes);
  const int threads = p.at.rows * bytes < 65536 ? 1 : p.threads;
  parallel_for(p.at.rows, threads, [&](int64_t begin, int64_t end) {
    int64_t run = run_of(p.at, begin);
    const auto source = [&](int64_t row) { return row < end ? source_of(p, row, run) : nullptr; };
    const char *next = source(begin), *later = source(begin + 1);
    for (int64_t row = begin; row < end; ++row) {
      const char* in = next;
      next = later;
      later = source(row + 2);
      char* out = static_cast<char*>(p.out) + row * bytes;
      if (!in)
        clear_row(out, bytes, streamed);
      else if (p.stride_channel == 1)
        copy_row(out, in, bytes, streamed, later, next);
      else
        copy_strided(out, in, p.channels, p.stride_channel, p.element_size);
    }
    if (streamed) _mm_sfence();
  });
}

template <class T> static void backward(const GatherTokensBackwardParams& p) {
  sort_rows(p.at, p.first, p.source);
  const auto grad = [&](int32_t row) {
    const T* g = static_cast<const T*>(p.grad);
    if (p.at.cu_seqlens) return g + row * p.stride_row;
    return g + row / p.at.run_length * p.stride_run + row % p.at.run_length * p.stride_row;
  };
  const int64_t tokens = p.at.batch * p.at.count, bytes = p.channels * int64_t{sizeof(T)};
  const bool streamed = worth_streaming(p.dx, tokens, bytes);
  const int32_t* const all = p.source + p.first[tokens]; // where the last token's rows end
  const int threads = tokens * p.channels < 16384 ? 1 : p.threads;
  parallel_for(tokens, threads, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      T* out = static_cast<T*>(p.dx) + token * p.channels;
      const int32_t *row = p.source + p.first[token], *last = p.source + p.first[token + 1];
      if (row == last) {
        clear_row(out, bytes, streamed);
        continue;
      }
      if (last - row == 1 && p.stride_channel == 1) {
        copy_row(out, grad(*row), bytes, streamed, streamed && last < all ? grad(*last) : nullptr);
        continue;
      }
      for (int64_t c = 0; c < p.channels; c += W) {
        const int n = p.channels - c < W ? static_cast<int>(p.channels - c) : W;
        vf sum = zero();
        for (const int32_t* r = row; r < last; ++r)
          sum = add(sum, load(grad(*r) + c * p.stride_channel, p.stride_channel, n));
        if (streamed)
          stream(out + c, sum);
        else
          store_first(out + c, sum, n);
      }
    }
    if (streamed) _mm_sfence();
  });
}

void gather_tokens_backward_cpu(const GatherTokensBackwardParams& p) {
  with_float(p.dtype, [&](auto x) { backward<decltype(x)>(p); });
}

} // namespace jepa::JEPA_ISA
