// |c - n|^2 = |c|^2 - (2 c.n - |n|^2), the least of it where the bracket is largest: three multiply-adds a
// pair. All are whole numbers below 2^24, exact in fp32.
#include "distance_weights/distance_weights.h"

#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"

namespace jepa::JEPA_ISA {

constexpr float FAR = 1e9f; // beyond every squared distance

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Coordinates {
  float frame, line, column;

  Coordinates(int64_t id, int64_t height, int64_t width)
      : frame(static_cast<float>(id / (height * width))),
        line(static_cast<float>(id % (height * width) / width)), column(static_cast<float>(id % width)) {}
  float square() const { return frame * frame + line * line + column * column; }
};

static int64_t begin_of(const PlacedRuns& runs, int64_t s) {
  return runs.starts ? runs.starts[s] : s * runs.length;
}

// The targets' coordinates and squared lengths, each in a row of its own.
struct Targets {
  float *frame, *line, *column, *square;

  Targets(float* places, int64_t rows)
      : frame(places), line(places + rows), column(places + 2 * rows), square(places + 3 * rows) {}

  void set(int64_t row, int64_t id, const DistanceWeightsForwardParams& p) const {
    const bool there = id >= 0 && id < p.count;
    const Coordinates patch(there ? id : 0, p.height, p.width);
    frame[row] = patch.frame;
    line[row] = patch.line;
    column[row] = patch.column;
    square[row] = there ? patch.square() : FAR;
  }

  // 2 c.n - |n|^2 of `rest` targets from `row`; the others are as if far away.
  vf nearness(int64_t row, int rest, vf twice_frame, vf twice_line, vf twice_column) const {
    vf sum = sub(zero(), load(square + row, 1, rest));
    sum = fma(twice_frame, load(frame + row, 1, rest), sum);
    sum = fma(twice_line, load(line + row, 1, rest), sum);
    sum = fma(twice_column, load(column + row, 1, rest), sum);
    return rest == W ? sum : select(first(rest), sum, set1(-FAR));
  }
};

constexpr int TOKENS = 4; // context tokens that share each load of targets

// Squared distances of TOKENS context tokens to the nearest of the targets [begin, end); FAR: there are none.
static void nearest(const Targets& targets, int64_t begin, int64_t end, const Coordinates* tokens,
                    float* out) {
  vf frame[TOKENS], line[TOKENS], column[TOKENS], best[TOKENS];
  for (int i = 0; i < TOKENS; ++i) {
    frame[i] = set1(2.f * tokens[i].frame);
    line[i] = set1(2.f * tokens[i].line);
    column[i] = set1(2.f * tokens[i].column);
    best[i] = set1(-FAR);
  }
  for (int64_t row = begin; row < end; row += W) {
    const int rest = static_cast<int>(least(end - row, W));
    for (int i = 0; i < TOKENS; ++i)
      best[i] = vmax(best[i], targets.nearness(row, rest, frame[i], line[i], column[i]));
  }
  for (int i = 0; i < TOKENS; ++i) out[i] = tokens[i].square() - hmax(best[i]);
}

static float weight_of(float square, float scale) {
  return square < FAR / 2 ? 1.f / __builtin_sqrtf(__builtin_sqrtf(square) / scale) : 0.f;
}

// Context tokens [row, row + n), n <= TOKENS, of one sequence whose targets are [begin, end).
static void weigh(const DistanceWeightsForwardParams& p, const Targets& targets, int64_t row, int n,
                  int64_t begin, int64_t end) {
  const auto id = [&](int i) { return p.context.ids[row + least(i, n - 1)]; };
  const auto patch = [&](int i) { return Coordinates(id(i), p.height, p.width); };
  const Coordinates tokens[TOKENS] = {patch(0), patch(1), patch(2), patch(3)};
  float squares[TOKENS];
  nearest(targets, begin, end, tokens, squares);
  for (int i = 0; i < n; ++i) {
    const bool there = id(i) >= 0 && id(i) < p.count;
    p.weights[row + i] = there ? weight_of(squares[i], p.scale) : 0.f;
  }
}

void distance_weights_forward_cpu(const DistanceWeightsForwardParams& p) {
  const Targets targets(p.places, p.target.rows);
  const int64_t pairs = p.sequences ? p.context.rows * p.target.rows / p.sequences : 0;
  const int threads = pairs < 65536 ? 1 : p.threads;
  parallel_for(p.target.rows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) targets.set(row, p.target.ids[row], p);
  });
  parallel_for(p.context.rows, threads, [&](int64_t begin, int64_t end) {
    int64_t run = 0, row = begin;
    while (row < end) {
      while (run < p.sequences && begin_of(p.context, run + 1) <= row) ++run;
      if (run == p.sequences) {
        std::memset(p.weights + row, 0, (end - row) * sizeof(float));
        return;
      }
      const int64_t last = least(end, begin_of(p.context, run + 1));
      for (; row < last; row += TOKENS)
        weigh(p, targets, row, static_cast<int>(least(last - row, TOKENS)), begin_of(p.target, run),
              begin_of(p.target, run + 1));
      row = last;
    }
  });
}

} // namespace jepa::JEPA_ISA
