// Memory-bound: forward reads each context row, position and id and writes each row once; backward reads each
// row of the gradient once and writes each sum once.
#include "assemble_tokens/assemble_tokens.h"

#include <type_traits>

#include "common/copy.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace jepa::JEPA_ISA {

constexpr int64_t SERIAL_ELEMENTS = 16384;

template <class T> static const T* row_of(const SequenceRows& rows, int64_t sequence, int64_t row) {
  return static_cast<const T*>(rows.data) + rows.offset[sequence] + row * rows.stride;
}

template <class T> static const T* row_of(const Table& table, int64_t row) {
  return static_cast<const T*>(table.data) + row * table.stride;
}

static int64_t length(const int64_t* start, int64_t sequence) {
  return start[sequence + 1] - start[sequence];
}

// body(sequence, place) for the rows of [begin, end) that lie in a sequence; the first row behind them all.
template <class Body>
static int64_t each_row(const int64_t* start, int64_t sequences, int64_t begin, int64_t end, Body body) {
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t first = start[s] > begin ? start[s] : begin, last = start[s + 1] < end ? start[s + 1] : end;
    for (int64_t row = first; row < last; ++row) body(s, row - start[s]);
  }
  return start[sequences] > begin ? start[sequences] : begin;
}

template <class T> struct Writer {
  int64_t channels;
  bool stream_out;

  void put(T* out, int64_t c, vf x) const {
    const int n = channels - c < W ? static_cast<int>(channels - c) : W;
    if (stream_out)
      stream(out + c, x);
    else
      store_first(out + c, x, n);
  }

  template <class A> void copy(T* out, const A* a, int64_t stride) const {
    if constexpr (std::is_same_v<A, T>)
      if (stride == 1) return copy_row(out, a, channels * sizeof(T), stream_out);
    for (int64_t c = 0; c < channels; c += W) put(out, c, read(a, stride, c));
  }

  template <class A, class B>
  void sum(T* out, const A* a, int64_t stride_a, const B* b, int64_t stride_b) const {
    for (int64_t c = 0; c < channels; c += W) put(out, c, add(read(a, stride_a, c), read(b, stride_b, c)));
  }

  template <class A> vf read(const A* a, int64_t stride, int64_t c) const {
    return load(a + c * stride, stride, channels - c < W ? static_cast<int>(channels - c) : W);
  }
};

// The mask tokens once, as R.
template <class R> static const R* read_tokens(const AssembleTokensForwardParams& p) {
  R* rows = static_cast<R*>(p.token_rows);
  const Writer<R> writer{p.channels, false};
  with_float(p.mask_token.dtype, [&](auto x) {
    for (int64_t g = 0; g < p.tokens; ++g)
      writer.copy(rows + g * p.channels, row_of<decltype(x)>(p.mask_token, g), p.mask_token.stride_channel);
  });
  return rows;
}

// T: of context and out; P: of the positions; R: of the mask tokens, fp32 where positions are added to them.
template <class T, class P, class R> static void forward(const AssembleTokensForwardParams& p) {
  const AssembledRows& at = p.at;
  const R* tokens = read_tokens<R>(p);
  const Writer<T> writer{p.channels, worth_streaming(p.out, at.rows, p.channels * int64_t{sizeof(T)})};
  const int threads = at.rows * p.channels < SERIAL_ELEMENTS ? 1 : p.threads;
  parallel_for(at.rows, threads, [&](int64_t begin, int64_t end) {
    const auto write = [&](T* out, const auto* x, int64_t stride, const int64_t* id) {
      if (id && *id >= 0 && *id < p.count)
        writer.sum(out, x, stride, row_of<P>(p.pos_embed, *id), p.pos_embed.stride_channel);
      else
        writer.copy(out, x, stride);
    };
    const int64_t behind = each_row(at.start, at.sequences, begin, end, [&](int64_t s, int64_t place) {
      T* out = static_cast<T*>(p.out) + (at.start[s] + place) * p.channels;
      const int64_t c = s % at.contexts, kept = length(at.context_start, c);
      if (place < kept) {
        const int64_t* id = p.context_ids ? p.context_ids + at.context_start[c] + place : nullptr;
        write(out, row_of<T>(p.context, c, place), p.context.stride_channel, id);
      } else {
        const int64_t target = p.target_ids ? p.target_start[s] + place - kept : p.targets;
        const int64_t* id = target < p.targets ? p.target_ids + target : nullptr;
        write(out, tokens + s / at.sequences_per_token * p.channels, 1, id);
      }
    });
    if (behind < end)
      std::memset(static_cast<T*>(p.out) + behind * p.channels, 0, (end - behind) * p.channels * sizeof(T));
    if (writer.stream_out) _mm_sfence();
  });
}

void assemble_tokens_forward_cpu(const AssembleTokensForwardParams& p) {
  with_float(p.dtype, [&](auto x) {
    using T = decltype(x);
    if (p.pos_embed.data)
      with_float(p.pos_embed.dtype, [&](auto y) { forward<T, decltype(y), float>(p); });
    else
      forward<T, T, T>(p);
  });
}

// Each context row once: the sum over the sequences that hold it, in order.
template <class T> static void context_gradient(const AssembleTokensBackwardParams& p) {
  const AssembledRows& at = p.at;
  const int threads = at.context_rows * p.channels < SERIAL_ELEMENTS ? 1 : p.threads;
  parallel_for(at.context_rows, threads, [&](int64_t begin, int64_t end) {
    T* all = static_cast<T*>(p.dcontext);
    const auto sum = [&](int64_t c, int64_t place) {
      T* out = all + (at.context_start[c] + place) * p.channels;
      if (at.sequences == at.contexts && p.grad.stride_channel == 1 && place < length(at.start, c))
        return copy_row(out, row_of<T>(p.grad, c, place), p.channels * sizeof(T), false);
      for (int64_t i = 0; i < p.channels; i += W) {
        const int n = p.channels - i < W ? static_cast<int>(p.channels - i) : W;
        vf total = zero();
        for (int64_t s = c; s < at.sequences; s += at.contexts)
          if (place < length(at.start, s))
            total = add(total, load(row_of<T>(p.grad, s, place) + i * p.grad.stride_channel,
                                    p.grad.stride_channel, n));
        store_first(out + i, total, n);
      }
    };
    const int64_t behind = each_row(at.context_start, at.contexts, begin, end, sum);
    if (behind < end) std::memset(all + behind * p.channels, 0, (end - behind) * p.channels * sizeof(T));
  });
}

// The sum of each part's rows, one after another.
template <class T> static void sum_parts(const AssembleTokensBackwardParams& p) {
  const AssembledRows& at = p.at;
  const int threads = at.rows * p.channels < SERIAL_ELEMENTS ? 1 : p.threads;
  parallel_for(p.first_part[at.sequences], threads, [&](int64_t begin, int64_t end) {
    each_row(p.first_part, at.sequences, begin, end, [&](int64_t s, int64_t part) {
      float* out = p.parts + (p.first_part[s] + part) * p.channels;
      std::memset(out, 0, p.channels * sizeof(float));
      const int64_t first = length(at.context_start, s % at.contexts) + part * TARGET_PART;
      const int64_t all = length(at.start, s), last = first + TARGET_PART < all ? first + TARGET_PART : all;
      for (int64_t place = first; place < last; ++place) {
        const T* grad = row_of<T>(p.grad, s, place);
        for (int64_t i = 0; i < p.channels; i += W) {
          const int n = p.channels - i < W ? static_cast<int>(p.channels - i) : W;
          const vf x = load(grad + i * p.grad.stride_channel, p.grad.stride_channel, n);
          store_first(out + i, add(load(out + i, 1, n), x), n);
        }
      }
    });
  });
}

// The parts of each token's sequences, in order; in double, as there may be thousands.
static void sum_tokens(const AssembleTokensBackwardParams& p) {
  constexpr int64_t BLOCK = 64;
  const int threads = p.first_part[p.at.sequences] * p.channels < SERIAL_ELEMENTS ? 1 : p.threads;
  parallel_for((p.channels + BLOCK - 1) / BLOCK, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t i = block * BLOCK, n = p.channels - i < BLOCK ? p.channels - i : BLOCK;
      for (int64_t g = 0; g < p.tokens; ++g) {
        double total[BLOCK] = {};
        const int64_t last = p.first_part[(g + 1) * p.at.sequences_per_token];
        for (int64_t part = p.first_part[g * p.at.sequences_per_token]; part < last; ++part)
          for (int64_t j = 0; j < n; ++j) total[j] += p.parts[part * p.channels + i + j];
        for (int64_t j = 0; j < n; ++j) p.dmask_token[g * p.channels + i + j] = static_cast<float>(total[j]);
      }
    }
  });
}

void assemble_tokens_backward_cpu(const AssembleTokensBackwardParams& p) {
  with_float(p.dtype, [&](auto x) {
    using T = decltype(x);
    if (p.dcontext) context_gradient<T>(p);
    if (p.dmask_token) sum_parts<T>(p);
  });
  if (p.dmask_token) sum_tokens(p);
}

} // namespace jepa::JEPA_ISA
