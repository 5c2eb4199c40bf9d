// A patch in its image, or the weights of one output: channels of lines of pixels, read to and written from
// one row.
#pragma once
#include "common/simd.h"

namespace jepa::JEPA_ISA {

static inline int part(int64_t left) { return left < W ? static_cast<int>(left) : W; }

template <class T> static inline void prefetch(const T* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

struct Patch {
  int64_t channels, lines, length; // `length` elements a line
  int64_t channel, line, step;     // strides

  Patch(int64_t channels, int64_t size, const int64_t* strides)
      : channels(channels), lines(size), length(size), channel(strides[0]), line(strides[1]),
        step(strides[2]) {
    if (line == length * step) { // lines follow each other: one long line
      length *= lines;
      lines = 1;
      if (channel == length * step) {
        length *= channels;
        this->channels = 1;
      }
    }
  }
};

// `row` is written up to W elements past the end.
template <class T> static inline void read_line(const T* p, int64_t step, int64_t length, float* row) {
  int64_t x = 0;
  if (step == 1)
    for (; x + W <= length; x += W) store(row + x, load(p + x));
  if (x > 0 && x < length) { // a register that overlaps the one before needs no mask
    store(row + length - W, load(p + length - W));
    return;
  }
  for (; x < length; x += W) store(row + x, load(p + x * step, step, part(length - x)));
}

template <class T> static void add_line(const T* p, int64_t step, int64_t length, float* row) {
  for (int64_t x = 0; x < length; x += W)
    store(row + x, add(load(row + x), load(p + x * step, step, part(length - x))));
}

template <class T> static void read_patch(const T* p, const Patch& shape, float* row) {
  for (int64_t c = 0; c < shape.channels; ++c)
    for (int64_t y = 0; y < shape.lines; ++y, row += shape.length)
      read_line(p + c * shape.channel + y * shape.line, shape.step, shape.length, row);
}

template <class T> static void write_line(const float* row, int64_t length, T* p) {
  for (int64_t x = 0; x < length; x += W) store_first(p + x, load(row + x), part(length - x));
}

// To memory whose lines are contiguous; `row` is readable to W elements past the end.
template <class T> static void write_patch(const float* row, const Patch& shape, T* p) {
  for (int64_t c = 0; c < shape.channels; ++c)
    for (int64_t y = 0; y < shape.lines; ++y, row += shape.length)
      write_line(row, shape.length, p + c * shape.channel + y * shape.line);
}

} // namespace jepa::JEPA_ISA
