// One pass over memory: each kept target row is read once, normalised in L1, compared, and the gradient of
// its prediction is written at once. Row sums are combined in row order, in double: no dependence on threads.
#include "latent_loss/latent_loss.h"

#include "common/copy.h"
#include "common/floats.h"
#include "common/parallel.h"
#include "latent_loss/row.h"

namespace jepa::JEPA_ISA {

static int64_t begin_of(const LatentLossForwardParams& p, int64_t s) {
  return p.cu_seqlens ? p.cu_seqlens[s] : s * p.run_length;
}

// Rows of mask j, and the weight of each of their elements in the loss.
struct Weights {
  int64_t masks, filled; // masks in all, and those with at least one row
  const LatentLossForwardParams& p;

  explicit Weights(const LatentLossForwardParams& params) : masks(0), filled(0), p(params) {
    masks = p.batch ? p.sequences / p.batch : 0;
    for (int64_t j = 0; j < masks; ++j) filled += rows(j) > 0;
  }
  int64_t rows(int64_t j) const { return begin_of(p, (j + 1) * p.batch) - begin_of(p, j * p.batch); }
  double of(int64_t j) const {
    const double tokens = p.per_mask ? double(rows(j)) * double(filled) : double(begin_of(p, p.sequences));
    return p.scale / (tokens * double(p.channels));
  }
};

// A row with its channels side by side: itself, or a copy in `scratch`.
template <class T> static const T* packed_row(const T* row, int64_t stride, int64_t n, T* scratch) {
  if (stride == 1) return row;
  for (int64_t c = 0; c < n; ++c) scratch[c] = row[c * stride];
  return scratch;
}

struct Place { // of a row: its run and token, where its elements start in pred and target, and its weight
  int64_t run, id, pred, target;
  float weight;
};

// Moves run on to the row's; id < 0: the row does not count.
static Place place_of(const LatentLossForwardParams& p, int64_t row, int64_t& run) {
  while (run < p.sequences && begin_of(p, run + 1) <= row) ++run;
  if (run >= p.sequences) return {run, -1, 0, 0, 0.f};
  const int64_t inside = row - begin_of(p, run), id = p.ids ? p.ids[row] : inside;
  const int64_t pred = p.cu_seqlens ? row * p.pred_row : run * p.pred_run + inside * p.pred_row;
  const int64_t weight = p.cu_seqlens ? row * p.weight_row : run * p.weight_run + inside * p.weight_row;
  return {run, id < p.count ? id : -1, pred, run % p.batch * p.target_image + id * p.target_token,
          p.weight ? p.weight[weight] : 1.f};
}

// A thread's copies of rows whose channels do not lie side by side, and a level after the encoder's norm.
template <class P, class T> struct RowScratch {
  P* pred;
  T* target;
  float* latent;

  explicit RowScratch(const LatentLossForwardParams& p)
      : pred(p.pred_channel == 1 ? nullptr : new P[p.channels]),
        target(p.target_channel == 1 ? nullptr : new T[p.channels]),
        latent(p.affine ? new float[p.channels / p.levels] : nullptr) {}
  RowScratch(const RowScratch&) = delete;
  ~RowScratch() {
    delete[] pred;
    delete[] target;
    delete[] latent;
  }
};

// Level `level` of a row and of those that follow: of the first of these, where it has no such level.
template <class T>
static Ahead<T> ahead_of(const T* const (&rows)[3], int64_t level, int64_t levels, int64_t width) {
  const auto at = [&](int64_t l) { return rows[l / levels] + l % levels * width; };
  return {at(level + 1), at(level + 2)};
}

// The summed distance of a row, level after level. preds and targets: the row, and the two that follow.
template <LossKind kind, class P, class T>
static double compare(const LatentLossForwardParams& p, const Comparison<kind>& how,
                      const P* const (&preds)[3], const T* const (&targets)[3],
                      typename UnitOf<P>::type* unit, float weight, float* latent) {
  const int64_t width = p.channels / p.levels;
  double sum = 0.0;
  for (int64_t level = 0; level < p.levels; ++level) {
    const int64_t at = level * width;
    const Ahead<P> pred = ahead_of(preds, level, p.levels, width);
    const Ahead<T> target = ahead_of(targets, level, p.levels, width);
    auto* grad = unit ? unit + at : nullptr;
    if (!p.affine) {
      sum += how(preds[0] + at, targets[0] + at, pred, target, grad, width, weight);
    } else {
      affine_norm(targets[0] + at, target, width, p.norm_eps, p.affine + at, p.affine + p.channels + at,
                  latent);
      sum += how(preds[0] + at, latent, pred, {latent, latent}, grad, width, weight);
    }
  }
  return sum;
}

template <LossKind kind, class P, class T> static void forward(const LatentLossForwardParams& p) {
  using Unit = typename UnitOf<P>::type;
  const Weights weights(p);
  const int64_t n = p.channels;
  const bool streamed = p.unit && worth_streaming(p.unit, p.rows, n * int64_t(sizeof(Unit))) &&
                        n / p.levels % (64 / sizeof(Unit)) == 0;
  const Comparison<kind> how(p, streamed);
  parallel_for(p.rows, p.rows * n < 16384 ? 1 : p.threads, [&](int64_t begin, int64_t end) {
    const RowScratch<P, T> scratch(p);
    const P* all_pred = static_cast<const P*>(p.pred);
    const T* all_target = static_cast<const T*>(p.target);
    int64_t run = 0, mask = -1;
    double element = 0.0; // weight of each element of the mask
    Place next = place_of(p, begin, run), second = next;
    if (begin + 1 < end) second = place_of(p, begin + 1, run);
    for (int64_t row = begin; row < end; ++row) {
      const Place here = next;
      next = second;
      if (row + 2 < end) second = place_of(p, row + 2, run);
      Unit* unit = p.unit ? static_cast<Unit*>(p.unit) + row * n : nullptr;
      if (here.id < 0) {
        p.row_loss[row] = 0.0;
        if (unit) std::memset(static_cast<void*>(unit), 0, n * sizeof(Unit));
        continue;
      }
      if (here.run / p.batch != mask) {
        mask = here.run / p.batch;
        element = weights.of(mask);
      }
      const P* pred = packed_row(all_pred + here.pred, p.pred_channel, n, scratch.pred);
      const T* target = packed_row(all_target + here.target, p.target_channel, n, scratch.target);
      const float weight = static_cast<float>(element * here.weight);
      const P* const preds[3] = {pred, all_pred + next.pred, all_pred + second.pred};
      const T* const targets[3] = {target, all_target + next.target, all_target + second.target};
      p.row_loss[row] = here.weight * compare(p, how, preds, targets, unit, weight, scratch.latent);
    }
    if (streamed) _mm_sfence();
  });
  double loss = 0.0;
  for (int64_t j = 0; j < weights.masks; ++j) {
    double sum = 0.0;
    for (int64_t row = begin_of(p, j * p.batch); row < begin_of(p, (j + 1) * p.batch); ++row)
      sum += p.row_loss[row];
    if (weights.rows(j) > 0 && n > 0) loss += sum * weights.of(j);
  }
  *p.loss = static_cast<float>(loss);
}

template <class P, class T> static void forward_of_kind(const LatentLossForwardParams& p) {
  switch (p.kind) {
  case LossKind::smooth_l1:
    return forward<LossKind::smooth_l1, P, T>(p);
  case LossKind::l1:
    return forward<LossKind::l1, P, T>(p);
  case LossKind::l2:
    return forward<LossKind::l2, P, T>(p);
  case LossKind::power:
    return forward<LossKind::power, P, T>(p);
  }
}

static void widen(const void* row, DType type, int64_t stride, int64_t n, float* out) {
  with_float(type, [&](auto x) {
    const auto* values = static_cast<const decltype(x)*>(row);
    for (int64_t i = 0; i < n; i += W) {
      const int rest = n - i < W ? static_cast<int>(n - i) : W;
      store_first(out + i, load(values + i * stride, stride, rest), rest);
    }
  });
}

void latent_loss_forward_cpu(const LatentLossForwardParams& p) {
  if (p.affine) {
    widen(p.gain, p.gain_dtype, p.gain_stride, p.channels, p.affine);
    widen(p.shift, p.shift_dtype, p.shift_stride, p.channels, p.affine + p.channels);
  }
  with_float(p.pred_dtype, [&](auto x) {
    with_float(p.target_dtype, [&](auto y) { forward_of_kind<decltype(x), decltype(y)>(p); });
  });
}

template <class Unit, class P> static void scale(const LatentLossBackwardParams& p) {
  const vf grad = set1(*p.grad);
  parallel_for(p.numel, p.numel < 32768 ? 1 : p.threads, [&](int64_t begin, int64_t end) {
    const Unit* unit = static_cast<const Unit*>(p.unit);
    P* out = static_cast<P*>(p.dpred);
    int64_t i = begin;
    for (; i + W <= end; i += W) store(out + i, mul(load(unit + i), grad));
    if (const int rest = static_cast<int>(end - i)) store(out + i, mul(load(unit + i, rest), grad), rest);
  });
}

void latent_loss_backward_cpu(const LatentLossBackwardParams& p) {
  with_float(p.dtype, [&](auto x) { scale<typename UnitOf<decltype(x)>::type, decltype(x)>(p); });
}

} // namespace jepa::JEPA_ISA
