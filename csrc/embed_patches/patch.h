// A patch in its image or clip, or the weights of one output: channels of frames of lines of pixels, read to
// and written from one row.
#pragma once
#include "common/lines.h"

namespace jepa::JEPA_ISA {

template <class T> static inline void prefetch(const T* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

struct Patch {
  int64_t channels, frames, lines, length; // `length` elements a line
  int64_t channel, frame, line, step;      // strides

  Patch(int64_t channels, int64_t frames, int64_t size, const int64_t* strides)
      : channels(channels), frames(frames), lines(size), length(size), channel(strides[0]), frame(strides[1]),
        line(strides[2]), step(strides[3]) {
    if (line == length * step) { // lines follow each other: one long line
      length *= lines;
      lines = 1;
      if (frame == length * step) {
        length *= this->frames;
        this->frames = 1;
      }
    }
  }
};

struct Identity {
  vf operator()(vf x) const { return x; }
};

struct Affine {
  vf scale, shift;
  vf operator()(vf x) const { return fma(x, scale, shift); }
};

// `row` is written up to W elements past the end.
template <class T, class Map = Identity>
static inline void read_line(const T* p, int64_t step, int64_t length, float* row, Map map = {}) {
  int64_t x = 0;
  if (step == 1)
    for (; x + W <= length; x += W) store(row + x, map(load(p + x)));
  if (x > 0 && x < length) { // a register that overlaps the one before needs no mask
    store(row + length - W, map(load(p + length - W)));
    return;
  }
  for (; x < length; x += W) store(row + x, map(load(p + x * step, step, part(length - x))));
}

// body(first element of the line, channel) in the order of a row.
template <class T, class Body> static inline void each_line(T* p, const Patch& shape, Body body) {
  for (int64_t c = 0; c < shape.channels; ++c)
    for (int64_t t = 0; t < shape.frames; ++t)
      for (int64_t y = 0; y < shape.lines; ++y)
        body(p + c * shape.channel + t * shape.frame + y * shape.line, c);
}

template <class T> static void read_patch(const T* p, const Patch& shape, float* row) {
  each_line(p, shape, [&](const T* line, int64_t) {
    read_line(line, shape.step, shape.length, row);
    row += shape.length;
  });
}

template <class T> static void add_patch(const T* p, const Patch& shape, float* row) {
  each_line(p, shape, [&](const T* line, int64_t) {
    add_line(line, shape.step, shape.length, row);
    row += shape.length;
  });
}

// With each channel's scale and shift.
template <class T>
static void read_patch(const T* p, const Patch& shape, const float* scale, const float* shift, float* row) {
  each_line(p, shape, [&](const T* line, int64_t c) {
    read_line(line, shape.step, shape.length, row, Affine{set1(scale[c]), set1(shift[c])});
    row += shape.length;
  });
}

// To memory whose lines are contiguous, each channel times its scale; `row` is readable to W elements past
// the end.
template <class T> static void write_patch(const float* row, const Patch& shape, const float* scale, T* p) {
  each_line(p, shape, [&](T* line, int64_t c) {
    const vf factor = set1(scale ? scale[c] : 1.f);
    for (int64_t x = 0; x < shape.length; x += W)
      store_first(line + x, mul(load(row + x), factor), part(shape.length - x));
    row += shape.length;
  });
}

} // namespace jepa::JEPA_ISA
