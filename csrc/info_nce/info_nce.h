// Symmetric contrastive loss: log-sum-exps of both sides of the matrix of similarities, a tile at a time, and
// the gradients, from tiles that are computed again.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"
#include "../common/dtype.h"

namespace jepa {

namespace info_nce {

constexpr int64_t TILE = 256;  // rows and columns of a tile of similarities
constexpr int64_t GROUPS = 8;  // of tiles of rows: what may run side by side, each with sums of its own
constexpr int64_t WIDEST = 32; // columns of a panel, on any processor
constexpr int64_t LINE = TILE + WIDEST; // of a tile in memory

// Embeddings of one side.
struct Side {
  const void* rows;
  int64_t count, row, channel; // strides in elements
  DType dtype;
  const float* items; // label of each row [count], or null: each row is an item of its own
};

// Floats of a row in the workspace: whole panels, and one to spare.
static inline int64_t width_of(int64_t channels) {
  return (channels + WIDEST - 1) / WIDEST * WIDEST + WIDEST;
}

static inline int64_t groups_of(int64_t rows) {
  const int64_t tiles = (rows + TILE - 1) / TILE;
  return tiles < GROUPS ? tiles : GROUPS;
}

static inline int64_t teams_of(int64_t rows, int threads) {
  const int64_t groups = groups_of(rows);
  return threads < groups ? threads : groups;
}

// Where things begin, in floats. A thread's own: rows of x, their panels (backward), a tile and its
// transpose.
struct Workspace {
  int64_t x_norm, y_norm, row_top;     // of all rows
  int64_t dots;                        // of all rows: gradient along x^ (backward); doubles
  int64_t columns, turned, cut;        // of a tile of y: its rows, and panels of either kind
  int64_t parts;                       // of each group: gradients of the tile of y (backward)
  int64_t col_top, col_total, col_sum; // of each group: of its columns (forward); totals and sums are doubles
  int64_t threads, each, size;
};

static inline Workspace workspace(int64_t rows, int64_t columns, int64_t channels, int threads,
                                  bool backward) {
  const int64_t tile = TILE * width_of(channels), groups = groups_of(rows);
  Workspace w{};
  const auto take = [&](int64_t floats) {
    const int64_t at = w.size;
    w.size += (floats + 15) / 16 * 16;
    return at;
  };
  w.x_norm = take(rows);
  w.y_norm = take(columns);
  w.columns = take(tile);
  w.turned = take(tile);
  if (backward) {
    w.cut = take(tile);
    w.dots = take(2 * rows);
    w.parts = take((groups ? groups : 1) * tile);
  } else {
    w.row_top = take(rows);
    w.col_top = take(groups * TILE);
    w.col_total = take(2 * groups * TILE);
    w.col_sum = take(2 * groups * TILE);
  }
  w.each = (backward ? 2 : 1) * (tile + TILE * LINE);
  w.threads = take(teams_of(rows, threads) * w.each);
  return w;
}

} // namespace info_nce

// S = x^ y^T / temperature, x^ and y^ the rows over their norms where `normalize`. Row i and column i + shift
// are a pair; other entries whose two items are equal are left out.
struct InfoNceForwardParams {
  info_nce::Side x, y;
  int64_t channels, shift;
  double temperature;
  bool normalize;
  double *row_lse, *col_lse;
  float* diagonal;           // S of each row's pair; left alone where the pair is in another block
  double *row_sum, *col_sum; // of the entries that are not left out; null: not asked for
  float* workspace;
  int threads;
};

// G = exp(S - row_lse) + exp(S - col_lse) - row_share - col_share, less 2 * kept for a pair, 0 for what is
// left out. The gradients of weight * sum(G S), G held fixed.
struct InfoNceBackwardParams {
  info_nce::Side x, y;
  int64_t channels, shift;
  double temperature;
  bool normalize;
  const double *row_lse, *col_lse;
  const float *row_share, *col_share; // null: 0
  double kept;
  float weight;
  void *dx, *dy;      // contiguous
  bool wide;          // they are fp32, else of the types of x and y
  float* accumulated; // dx in fp32, all 0, in rows of whole panels; dx itself where it is just that
  int64_t accumulated_row;
  double* dtemperature; // [1]
  float* workspace;
  int threads;
};

JEPA_DECLARE_CPU(info_nce_forward_cpu, InfoNceForwardParams)
JEPA_DECLARE_CPU(info_nce_backward_cpu, InfoNceBackwardParams)

} // namespace jepa
