// Weights of context tokens by the distance to the nearest target token of their sequence.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"

namespace jepa {

// Ids of `sequences` runs, which start at starts[s], or are `length` long where starts is null.
struct PlacedRuns {
  const int64_t* ids;
  const int32_t* starts;
  int64_t length, rows;
};

// weights = 1 / sqrt(distance / scale); 0 where a sequence has no targets, past the last sequence, and where
// an id lies outside the grid. Such targets do not count.
struct DistanceWeightsForwardParams {
  PlacedRuns context, target;
  int64_t sequences, count, height, width; // count: patches of the grid
  float scale;
  float* places;  // workspace [4 * target.rows]
  float* weights; // [context.rows]
  int threads;
};

JEPA_DECLARE_CPU(distance_weights_forward_cpu, DistanceWeightsForwardParams)

} // namespace jepa
