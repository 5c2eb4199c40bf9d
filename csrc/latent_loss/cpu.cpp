// One pass over memory: each kept target row is read once, normalised in L1, compared, and the gradient of
// its prediction is written at once. Row sums are combined in row order, in double: no dependence on threads.
#include "latent_loss/latent_loss.h"

#include <cmath>

#include "common/floats.h"
#include "common/parallel.h"
#include "common/simd.h"

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
    return 1.0 / (tokens * double(p.channels));
  }
};

struct Norm {
  float mean, rstd;
};

// `registers` registers of elements ahead of their use. The rows of the next token are asked for while this
// one is computed: gathered rows are short, and the hardware's own prefetch stops at each one's end.
template <int registers, class T> static inline void prefetch(const T* p) {
  constexpr int LINE = 64;
  for (int byte = 0; byte < registers * W * int(sizeof(T)); byte += LINE)
    _mm_prefetch(reinterpret_cast<const char*>(p) + byte, _MM_HINT_T0);
}

// Two passes over a row that the first brought into L1: no cancellation.
template <class T> static Norm norm_of(const T* row, const T* next, int64_t n, float eps) {
  vf sum[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    prefetch<4>(next + i);
    for (int u = 0; u < 4; ++u) sum[u] = add(sum[u], load(row + i + u * W));
  }
  for (; i < n; i += W)
    sum[0] = add(sum[0], n - i < W ? load(row + i, static_cast<int>(n - i)) : load(row + i));
  const float mean = hsum(add(add(sum[0], sum[1]), add(sum[2], sum[3]))) / static_cast<float>(n);

  const vf m = set1(mean);
  vf square[4] = {zero(), zero(), zero(), zero()};
  for (i = 0; i + 4 * W <= n; i += 4 * W)
    for (int u = 0; u < 4; ++u) {
      const vf d = sub(load(row + i + u * W), m);
      square[u] = fma(d, d, square[u]);
    }
  for (; i < n; i += W) {
    const int rest = n - i < W ? static_cast<int>(n - i) : W;
    const vf d = select(first(rest), sub(load(row + i, rest), m), zero());
    square[0] = fma(d, d, square[0]);
  }
  const float total = hsum(add(add(square[0], square[1]), add(square[2], square[3])));
  return {mean, 1.f / std::sqrt(total / static_cast<float>(n) + eps)};
}

// Of one register of differences d. min and max hand on their second operand if it is NaN.
template <LossKind kind> static inline vf derivative(vf d, vf inverse_beta) {
  if constexpr (kind == LossKind::l2) return add(d, d);
  if constexpr (kind == LossKind::smooth_l1) return vmin(set1(1.f), vmax(set1(-1.f), mul(d, inverse_beta)));
  const vf sign = select(less(zero(), d), set1(1.f), select(less(d, zero()), set1(-1.f), zero()));
  return add(sign, sub(d, d)); // NaN stays NaN
}
// sum + distance, with s the derivative. smooth_l1 on both sides of beta: s (d - beta s / 2).
template <LossKind kind> static inline vf add_distance(vf sum, vf d, vf s, vf minus_half_beta) {
  if constexpr (kind == LossKind::l1) return add(sum, vabs(d));
  if constexpr (kind == LossKind::l2) return fma(d, d, sum);
  return fma(s, fma(minus_half_beta, s, d), sum);
}

template <class T> struct UnitOf {
  using type = T;
};
template <> struct UnitOf<f16> { // 1 / count underflows in fp16
  using type = float;
};

template <LossKind kind, class P, class T> struct RowKernel {
  using Unit = typename UnitOf<P>::type;
  vf minus_half_beta, inverse_beta;
  bool normalize, streamed;
  float eps;

  // The row's summed distance; unit (or null) gets weight * derivative.
  double operator()(const P* pred, const T* target, const P* next_pred, const T* next_target, Unit* unit,
                    int64_t n, float weight) const {
    const Norm norm = normalize ? norm_of(target, next_target, n, eps) : Norm{0.f, 1.f};
    const vf mean = set1(norm.mean), rstd = set1(norm.rstd), w = set1(weight);
    const vf slope = inverse_beta,
             bend = minus_half_beta; // in registers: a store to unit might change a member
    vf sum[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
      prefetch<4>(next_pred + i);
      for (int u = 0; u < 4; ++u) {
        const int64_t at = i + u * W;
        const vf d = fma(sub(mean, load(target + at)), rstd, load(pred + at));
        const vf s = derivative<kind>(d, slope);
        sum[u] = add_distance<kind>(sum[u], d, s, bend);
        if (!unit) continue;
        if (streamed)
          stream(unit + at, mul(w, s));
        else
          store(unit + at, mul(w, s));
      }
    }
    for (; i < n; i += W) {
      const int rest = n - i < W ? static_cast<int>(n - i) : W;
      const vf d = fma(sub(mean, load(target + i, rest)), rstd, load(pred + i, rest));
      const vf s = derivative<kind>(d, slope);
      sum[0] = select(first(rest), add_distance<kind>(sum[0], d, s, bend), sum[0]);
      if (unit) store(unit + i, mul(w, s), rest);
    }
    return hsum(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
  }
};

// A row with its channels side by side: itself, or a copy in `scratch`.
template <class T> static const T* packed_row(const T* row, int64_t stride, int64_t n, T* scratch) {
  if (stride == 1) return row;
  for (int64_t c = 0; c < n; ++c) scratch[c] = row[c * stride];
  return scratch;
}

struct Place { // of a row: its token, and where its elements start in pred and target
  int64_t id, pred, target;
};

constexpr int64_t STREAM_BYTES = int64_t{24} << 20; // past the last-level cache, bypass it

template <LossKind kind, class P, class T> static void forward(const LatentLossForwardParams& p) {
  using Unit = typename UnitOf<P>::type;
  const Weights weights(p);
  const int64_t n = p.channels;
  const bool streamed =
      p.unit && p.rows * n * int64_t(sizeof(Unit)) > STREAM_BYTES && n % (64 / sizeof(Unit)) == 0;
  const RowKernel<kind, P, T> kernel{set1(-0.5f * p.beta), set1(1.f / p.beta), p.normalize, streamed, p.eps};
  const auto at = [&](int64_t row,
                      int64_t& run) { // moves run on to the row's; id < 0: the row does not count
    while (run < p.sequences && begin_of(p, run + 1) <= row) ++run;
    if (run >= p.sequences) return Place{-1, 0, 0};
    const int64_t inside = row - begin_of(p, run), id = p.ids ? p.ids[row] : inside;
    const int64_t pred_at = p.cu_seqlens ? row * p.pred_row : run * p.pred_run + inside * p.pred_row;
    return Place{id < p.count ? id : -1, pred_at, run % p.batch * p.target_image + id * p.target_token};
  };
  parallel_for(p.rows, p.rows * n < 16384 ? 1 : p.threads, [&](int64_t begin, int64_t end) {
    P* pred_scratch = p.pred_channel == 1 ? nullptr : new P[n];
    T* target_scratch = p.target_channel == 1 ? nullptr : new T[n];
    int64_t run = 0, mask = -1;
    float weight = 0.f;
    Place next = at(begin, run);
    for (int64_t row = begin; row < end; ++row) {
      const Place here = next;
      const int64_t own_run = run;
      if (row + 1 < end) next = at(row + 1, run);
      Unit* unit = p.unit ? static_cast<Unit*>(p.unit) + row * n : nullptr;
      if (here.id < 0) {
        p.row_loss[row] = 0.0;
        if (unit) std::memset(static_cast<void*>(unit), 0, n * sizeof(Unit));
        continue;
      }
      if (own_run / p.batch != mask) {
        mask = own_run / p.batch;
        weight = static_cast<float>(weights.of(mask));
      }
      const P* all_pred = static_cast<const P*>(p.pred);
      const T* all_target = static_cast<const T*>(p.target);
      const P* pred = packed_row(all_pred + here.pred, p.pred_channel, n, pred_scratch);
      const T* target = packed_row(all_target + here.target, p.target_channel, n, target_scratch);
      p.row_loss[row] = kernel(pred, target, all_pred + next.pred, all_target + next.target, unit, n, weight);
    }
    if (streamed) _mm_sfence();
    delete[] pred_scratch;
    delete[] target_scratch;
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
  }
}

void latent_loss_forward_cpu(const LatentLossForwardParams& p) {
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
