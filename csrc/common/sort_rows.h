// Walks over kept rows, and their order by token.
#pragma once
#include <cstring>

#include "common/rows.h"

namespace jepa::JEPA_ISA {

static inline int64_t begin_of(const KeptRows& at, int64_t s) {
  return at.cu_seqlens ? at.cu_seqlens[s] : s * at.run_length;
}

// body(token, row) for each row in order; token = image * count + id.
template <class Body> static void each_kept(const KeptRows& at, Body body) {
  if (at.batch == 0) return;
  for (int64_t s = 0; s < at.sequences; ++s)
    for (int64_t begin = begin_of(at, s), end = begin_of(at, s + 1), row = begin; row < end; ++row) {
      const int64_t id = at.ids ? at.ids[row] : row - begin;
      if (id >= 0 && id < at.count) body(s % at.batch * at.count + id, row);
    }
}

// Counting sort of the rows by the token they read; rows of one token keep their order.
static void sort_rows(const KeptRows& at, int32_t* first, int32_t* source) {
  const int64_t tokens = at.batch * at.count;
  std::memset(first, 0, (tokens + 1) * sizeof(int32_t));
  each_kept(at, [&](int64_t token, int64_t) { ++first[token + 1]; });
  for (int64_t i = 0; i < tokens; ++i) first[i + 1] += first[i];
  each_kept(at, [&](int64_t token, int64_t row) { source[first[token]++] = static_cast<int32_t>(row); });
  for (int64_t i = tokens; i > 0; --i) first[i] = first[i - 1]; // each had moved on to the next token's start
  first[0] = 0;
}

} // namespace jepa::JEPA_ISA
