// Which keys a block of queries sees.
#pragma once
#include <limits>

#include "masked_attention/masked_attention.h"

namespace jepa::JEPA_ISA {

constexpr int64_t BLOCK = 48; // queries at a time: a multiple of every register and of most tiles' rows

struct Visible {
  int32_t begin[BLOCK], end[BLOCK]; // of each query; not set where all see all
  int64_t first = 0, last = 0;      // some query sees a key of [first, last) ...
  int64_t all_first = 0, all_last;  // ... and every query all of [all_first, all_last)

  // `position` of the first query; `ranges` its range of keys, or null.
  Visible(const AttentionShape& shape, int64_t position, const int32_t* ranges, int64_t count, int64_t keys)
      : all_last(keys) {
    if (!shape.frame_size && !ranges) last = keys;
    if (last) return;
    for (int64_t i = 0; i < count; ++i) {
      int64_t from = 0, to = shape.frame_size ? frame_end(position + i, shape.frame_size, keys) : keys;
      if (ranges) {
        const int32_t* range = ranges + i * shape.ranges.row;
        from = range[0] < 0 ? 0 : range[0];
        to = range[1] < to ? range[1] : to;
      }
      if (from >= to) from = to = all_last = 0;
      begin[i] = static_cast<int32_t>(from);
      end[i] = static_cast<int32_t>(to);
      if (from < to && (first == last || from < first)) first = from;
      if (to > last) last = to;
      if (from > all_first) all_first = from;
      if (to < all_last) all_last = to;
    }
    first -= first % 2; // pairs of keys stay together
  }

  void include(const Visible& other) {
    if (other.first == other.last) return;
    if (first == last || other.first < first) first = other.first;
    if (other.last > last) last = other.last;
  }

  // Scores of the keys [from, to), a query in each lane: -inf where it does not see the key.
  void hide(float* scores, int64_t from, int64_t to, int64_t count) const {
    if (all_first <= from && to <= all_last) return;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = from; j < to && j < begin[i]; ++j) put(scores, j - from, i);
      for (int64_t j = end[i] > from ? end[i] : from; j < to; ++j) put(scores, j - from, i);
    }
  }

private:
  static void put(float* scores, int64_t j, int64_t i) {
    scores[j * BLOCK + i] = -std::numeric_limits<float>::infinity();
  }
};

} // namespace jepa::JEPA_ISA
