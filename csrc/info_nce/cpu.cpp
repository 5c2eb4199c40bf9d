// Tiles of y in order, and against each the tiles of x, shared out in fixed groups: sums are added in one
// order, whatever the number of threads. Rows of S, and gradients of x, belong to the group of their tile.
#include "info_nce/tile.h"

namespace jepa::JEPA_ISA {

using info_nce::Workspace;

// The log-sum-exp so far is top + log(total).
static void merge(float top, double total, float& all_top, double& all_total) {
  if (total == 0.0) return; // nothing seen
  if (top > all_top) {
    all_total *= std::exp(static_cast<double>(all_top) - top);
    all_top = top;
  }
  all_total += top == all_top ? total : total * std::exp(static_cast<double>(top) - all_top);
}

// Of the columns of a tile of y, in the order of rows.
struct ColumnSums {
  float* top;
  double *total, *sum; // sum: null where not asked for

  void clear(int64_t count) const {
    for (int64_t c = 0; c < count; ++c) {
      top[c] = LOWEST;
      total[c] = 0.0;
      if (sum) sum[c] = 0.0;
    }
  }
  ColumnSums group(int64_t g) const {
    return {top + g * TILE, total + g * TILE, sum ? sum + g * TILE : nullptr};
  }
  void add(const ColumnSums& part, int64_t count) const {
    for (int64_t c = 0; c < count; ++c) {
      merge(part.top[c], part.total[c], top[c], total[c]);
      if (sum) sum[c] += part.sum[c];
    }
  }
};

// 2^((s - top) log2 e); 0 where nothing was seen.
static inline vf weight_of(vf s, vf top) { return exp2v(mul(sub(s, top), set1(LOG2E))); }

static float finite_top(float top) { return top == LOWEST ? 0.f : top; }

// Weights of one line of a tile: those of its top, which are 1, apart from the others. Added to 1, small ones
// would be lost, and with them a small loss.
struct Weights {
  vf tops, others;

  void add_weight(vf s, vf top) {
    const vf weight = weight_of(s, top);
    const auto below = less(s, top);
    others = add(others, select(below, weight, zero()));
    tops = add(tops, select(below, zero(), weight));
  }
};

// Log-sum-exps of the tile along both sides, merged into those of its rows and columns.
static void sum_weights(const Tile& tile, float* row_top, double* row_total, const ColumnSums& columns) {
  alignas(64) float col_top[TILE], own_top[TILE], col_tops[TILE] = {}, col_others[TILE] = {};
  const int64_t padded = tile.padded();
  for (int64_t c = 0; c < padded; ++c) col_top[c] = LOWEST;
  for (int64_t r = 0; r < tile.rows.count; ++r) {
    vf top = set1(LOWEST);
    for (int64_t c = 0; c < padded; c += W) {
      const vf s = load(tile.row(r) + c);
      top = vmax(s, top);
      store(col_top + c, vmax(s, load(col_top + c)));
    }
    own_top[r] = finite_top(hmax(top));
  }
  for (int64_t c = 0; c < padded; ++c) col_top[c] = finite_top(col_top[c]);
  for (int64_t r = 0; r < tile.rows.count; ++r) {
    const vf top = set1(own_top[r]);
    Weights across{zero(), zero()};
    for (int64_t c = 0; c < padded; c += W) {
      const vf s = load(tile.row(r) + c);
      across.add_weight(s, top);
      Weights down{load(col_tops + c), load(col_others + c)};
      down.add_weight(s, load(col_top + c));
      store(col_tops + c, down.tops);
      store(col_others + c, down.others);
    }
    const int64_t row = tile.rows.first + r;
    merge(own_top[r], double(hsum(across.tops)) + hsum(across.others), row_top[row], row_total[row]);
  }
  for (int64_t c = 0; c < tile.columns.count; ++c)
    merge(col_top[c], double(col_tops[c]) + col_others[c], columns.top[c], columns.total[c]);
}

// Sums of the entries that are not left out.
static void sum_entries(const Tile& tile, double* row_sum, double* col_sum) {
  alignas(64) float down[TILE] = {};
  const vf lowest = set1(LOWEST);
  for (int64_t r = 0; r < tile.rows.count; ++r) {
    vf across = zero();
    for (int64_t c = 0; c < tile.padded(); c += W) {
      const vf s = load(tile.row(r) + c), counted = select(less(lowest, s), s, zero());
      across = add(across, counted);
      store(down + c, add(load(down + c), counted));
    }
    row_sum[tile.rows.first + r] += hsum(across);
  }
  for (int64_t c = 0; c < tile.columns.count; ++c) col_sum[c] += down[c];
}

// What both passes share: the tiles of y brought in one after another, and those of x against each.
template <class Params> struct Pass {
  const Params& p;
  Workspace w;
  int64_t width, groups;
  int threads;

  Pass(const Params& params, bool backward)
      : p(params), w(info_nce::workspace(p.x.count, p.y.count, p.channels, p.threads, backward)),
        width(info_nce::width_of(p.channels)), groups(info_nce::groups_of(p.x.count)), threads(p.threads) {
    if (p.x.count * p.channels < 16384) threads = 1;
    norms(p.x, p.channels, p.normalize, threads, p.workspace + w.x_norm);
    norms(p.y, p.channels, p.normalize, threads, p.workspace + w.y_norm);
  }
  float* at(int64_t place) const { return p.workspace + place; }

  void bring_columns(Range columns, bool backward) const {
    const int64_t panels = (columns.count + COLUMNS - 1) / COLUMNS;
    parallel_for(panels, threads, [&](int64_t begin, int64_t end) {
      const Range own{columns.first + begin * COLUMNS,
                      (end * COLUMNS < columns.count ? end * COLUMNS : columns.count) - begin * COLUMNS};
      float* rows = at(w.columns) + begin * COLUMNS * width;
      bring(p.y, own, p.channels, at(w.y_norm), 1.0, width, rows);
      for (int64_t i = begin; i < end; ++i)
        interleave<COLUMNS>(at(w.columns) + i * COLUMNS * width, width, p.channels,
                            at(w.turned) + i * COLUMNS * p.channels);
      for (int64_t r = 0; backward && r < own.count; ++r)
        cut<COLUMNS>(rows + r * width, p.channels, begin * COLUMNS + r, columns.count, at(w.cut));
    });
  }

  // body(group, tile, rows of x, what is left of the thread's own space) for each tile of the column of
  // tiles.
  template <class Body> void each_tile(Range columns, Body body) const {
    const int64_t tiles = tiles_of(p.x.count);
    parallel_dynamic(groups, static_cast<int>(info_nce::teams_of(p.x.count, threads)), [&](int64_t g) {
      float* rows = at(w.threads) + thread_rank() * w.each;
      float* s = rows + TILE * width;
      for (int64_t i = tiles * g / groups; i < tiles * (g + 1) / groups; ++i) {
        const Tile tile{tile_at(i, p.x.count), columns, p.shift, s};
        bring(p.x, tile.rows, p.channels, at(w.x_norm), p.temperature, width, rows);
        tile.multiply(rows, width, at(w.turned), p.channels);
        body(g, tile, rows, s + TILE * LINE);
      }
    });
  }
};

void info_nce_forward_cpu(const InfoNceForwardParams& p) {
  const Pass<InfoNceForwardParams> pass(p, false);
  const Workspace& w = pass.w;
  float* row_top = pass.at(w.row_top);
  const ColumnSums all{pass.at(w.col_top), reinterpret_cast<double*>(pass.at(w.col_total)),
                       p.col_sum ? reinterpret_cast<double*>(pass.at(w.col_sum)) : nullptr};
  ColumnSums{row_top, p.row_lse, p.row_sum}.clear(p.x.count);
  for (int64_t j = 0; j < tiles_of(p.y.count); ++j) {
    const Range columns = tile_at(j, p.y.count);
    pass.bring_columns(columns, false);
    for (int64_t g = 0; g < pass.groups; ++g) all.group(g).clear(columns.count);
    pass.each_tile(columns, [&](int64_t g, const Tile& tile, float*, float*) {
      for (int64_t r = 0; r < tile.rows.count; ++r)
        if (tile.holds_pair(r)) p.diagonal[tile.rows.first + r] = tile.row(r)[tile.pair_of(r)];
      tile.leave_out(p.x.items, p.y.items);
      sum_weights(tile, row_top, p.row_lse, all.group(g));
      if (p.row_sum) sum_entries(tile, p.row_sum, all.group(g).sum);
    });
    for (int64_t g = 1; g < pass.groups; ++g) all.add(all.group(g), columns.count);
    for (int64_t c = 0; c < columns.count; ++c) {
      p.col_lse[columns.first + c] = pass.groups ? all.top[c] + std::log(all.total[c]) : LOWEST;
      if (p.col_sum) p.col_sum[columns.first + c] = pass.groups ? all.sum[c] : 0.0;
    }
  }
  for (int64_t i = 0; i < p.x.count; ++i) p.row_lse[i] = row_top[i] + std::log(p.row_lse[i]);
}

// A log-sum-exp in two floats: where it is large, fp32 alone would lose the weights' last bits.
static void split(const double* lse, int64_t count, float* high, float* low) {
  for (int64_t i = 0; i < count; ++i) {
    high[i] = static_cast<float>(lse[i]);
    low[i] = static_cast<float>(lse[i] - high[i]);
  }
}

// G of a pair, whose parts nearly cancel where the loss is small.
static float of_pair(float s, int64_t row, int64_t column, const InfoNceBackwardParams& p) {
  const double share = p.row_share ? double(p.row_share[row]) + p.col_share[column] : 0.0;
  return static_cast<float>(std::expm1(s - p.row_lse[row]) + std::expm1(s - p.col_lse[column]) +
                            2.0 * (1.0 - p.kept) - share);
}

// S becomes G. Rows up to a multiple of 8 behind the last one become 0.
static void differentiate(const Tile& tile, const InfoNceBackwardParams& p) {
  alignas(64) float high[TILE] = {}, low[TILE] = {}, share[TILE] = {};
  split(p.col_lse + tile.columns.first, tile.columns.count, high, low);
  for (int64_t c = 0; p.col_share && c < tile.columns.count; ++c)
    share[c] = p.col_share[tile.columns.first + c];
  const int64_t padded = tile.padded();
  const vf least = set1(-__FLT_MAX__);
  for (int64_t r = 0; r < tile.rows.count; ++r) {
    const int64_t row = tile.rows.first + r;
    float own_high, own_low;
    split(p.row_lse + row, 1, &own_high, &own_low);
    const float pair = tile.holds_pair(r) ? tile.row(r)[tile.pair_of(r)] : 0.f;
    const vf top = set1(own_high), rest = set1(own_low), own = set1(p.row_share ? p.row_share[row] : 0.f);
    for (int64_t c = 0; c < padded; c += W) {
      const vf s = load(tile.row(r) + c);
      const vf across = weight_of(sub(s, top), rest);
      const vf down = weight_of(sub(s, load(high + c)), load(low + c));
      const vf g = sub(add(across, down), add(own, load(share + c)));
      store(tile.row(r) + c, select(less(s, least), zero(), g));
    }
    if (tile.holds_pair(r))
      tile.row(r)[tile.pair_of(r)] = of_pair(pair, row, tile.columns.first + tile.pair_of(r), p);
  }
  for (int64_t r = tile.rows.count; r % 8; ++r) std::memset(tile.row(r), 0, padded * sizeof(float));
}

// out = factor * (gradient by a row's direction) over its norm; returns direction . gradient.
template <class T, class Out>
static double write_gradient(const T* row, int64_t stride, float norm, bool normalize, const float* gradient,
                             int64_t channels, float factor, Out* out) {
  vf sum = zero();
  const vf divisor = set1(norm);
  for (int64_t c = 0; c < channels; c += W) {
    const int lanes = part(channels - c);
    sum = fma(div(load(row + c * stride, stride, lanes), divisor), load(gradient + c, lanes), sum);
  }
  const float dot = hsum(sum);
  const vf along = set1(normalize && norm > LEAST_NORM ? -dot : 0.f), scale = set1(factor / norm);
  for (int64_t c = 0; c < channels; c += W) {
    const int lanes = part(channels - c);
    const vf direction = div(load(row + c * stride, stride, lanes), divisor);
    store_first(out + c, mul(scale, fma(direction, along, load(gradient + c, lanes))), lanes);
  }
  return dot;
}

// Gradients of rows [at], from those of their directions; `dots` gets direction . gradient, or is null.
static void write_gradients(const Side& side, Range at, const float* norm, const InfoNceBackwardParams& p,
                            const float* gradients, int64_t width, float factor, void* out, double* dots,
                            int threads) {
  with_float(side.dtype, [&](auto x) {
    with_float(p.wide ? DType::f32 : side.dtype, [&](auto y) {
      using T = decltype(x);
      using Out = decltype(y);
      parallel_for(at.count, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const int64_t i = at.first + r;
          const double dot = write_gradient(static_cast<const T*>(side.rows) + i * side.row, side.channel,
                                            norm[i], p.normalize, gradients + r * width, p.channels, factor,
                                            static_cast<Out*>(out) + i * p.channels);
          if (dots) dots[r] = dot;
        }
      });
    });
  });
}

void info_nce_backward_cpu(const InfoNceBackwardParams& p) {
  const Pass<InfoNceBackwardParams> pass(p, true);
  const Workspace& w = pass.w;
  const int64_t width = pass.width, part = TILE * width;
  for (int64_t j = 0; j < tiles_of(p.y.count); ++j) {
    const Range columns = tile_at(j, p.y.count);
    pass.bring_columns(columns, true);
    std::memset(pass.at(w.parts), 0, (pass.groups ? pass.groups : 1) * part * sizeof(float));
    pass.each_tile(columns, [&](int64_t g, const Tile& tile, float* rows, float* own) {
      float *turned = own, *panels = own + TILE * LINE;
      tile.leave_out(p.x.items, p.y.items);
      differentiate(tile, p);
      multiply_tile(tile.rows.count, p.channels, columns.count, tile.s, LINE, pass.at(w.cut),
                    p.accumulated + tile.rows.first * p.accumulated_row, p.accumulated_row);
      cut_rows(rows, tile.rows.count, p.channels, width, panels);
      transpose(tile.s, LINE, (tile.rows.count + 7) / 8 * 8, tile.padded(), turned, LINE);
      multiply_tile(columns.count, p.channels, tile.rows.count, turned, LINE, panels,
                    pass.at(w.parts) + g * part, width);
    });
    float* sum = pass.at(w.parts);
    for (int64_t g = 1; g < pass.groups; ++g)
      for (int64_t i = 0; i < columns.count * width; i += W)
        store(sum + i, add(load(sum + i), load(sum + g * part + i)));
    write_gradients(p.y, columns, pass.at(w.y_norm), p, sum, width, p.weight, p.dy, nullptr, pass.threads);
  }
  const float factor = static_cast<float>(p.weight / p.temperature);
  double *dots = reinterpret_cast<double*>(pass.at(w.dots)), dot = 0.0;
  write_gradients(p.x, {0, p.x.count}, pass.at(w.x_norm), p, p.accumulated, p.accumulated_row, factor, p.dx,
                  dots, pass.threads);
  for (int64_t i = 0; i < p.x.count; ++i) dot += dots[i];
  *p.dtemperature = -dot * p.weight / (p.temperature * p.temperature);
}

} // namespace jepa::JEPA_ISA
