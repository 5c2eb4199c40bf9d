// Samplers of block masks, for data-loader workers: one thread, since a forked worker must not enter OpenMP.
#pragma once
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "random.h"

namespace jepa {

struct Range {
  double least, most;
  double at(double u) const { return least + u * (most - least); }
};

// Rows of ids, one after another.
struct MaskRows {
  std::unique_ptr<int64_t[]> ids; // room that is not cleared: every id in use is written
  std::vector<int64_t> lengths;

  void make_room(int64_t count) { ids.reset(new int64_t[count]); }

  int64_t total() const { return std::accumulate(lengths.begin(), lengths.end(), int64_t{0}); }

  // Keeps the first ids of each row, as many as the shortest row has.
  void truncate();
};

struct Masks {
  MaskRows context, target;
};

struct BlockSize {
  int64_t height, width;
};

// Sides of a block of `patches` patches with height / width = aspect: at least 1, at most `most`.
BlockSize block_size(int64_t patches, double aspect, BlockSize most);

struct MultiBlock2dParams {
  int64_t batch;
  BlockSize grid;
  Range target_scale, target_aspect, context_scale;
  double context_aspect;
  int64_t num_targets, min_keep;
  bool truncate;
  bool short_of_edge; // as published: no block touches the last row or column

  BlockSize target_size(double u) const;
  BlockSize context_size(double u) const;
};

// contexts [B], targets [num_targets * B], mask-major. `sizes` gives the batch's sizes, `places` each
// block's.
Masks multiblock2d(const MultiBlock2dParams&, Random& sizes, Random& places);

struct MultiBlock3dParams {
  int64_t batch, frames;
  BlockSize grid;
  int64_t num_blocks;
  Range spatial_scale, temporal_scale, aspect;
  int64_t context_frames; // later frames belong to the targets
  int64_t max_keep;       // patches of a context
  bool truncate, full_complement, pred_full_complement, inv_block;
};

// A set of patches of each of some clips: a bit a patch, and a frame begins with a word of its own.
struct PatchSets {
  int64_t clips, frames, words; // words: of a frame
  std::vector<uint64_t> bits;   // [clips, frames, words]
  std::vector<int64_t> counts;  // [clips], of patches

  explicit PatchSets(const MultiBlock3dParams&);
  uint64_t* clip(int64_t i) { return bits.data() + i * frames * words; }
  const uint64_t* clip(int64_t i) const { return bits.data() + i * frames * words; }
};

// The masks of one spec after another; then the rows of all, contexts [specs * B] and targets [specs * B].
class MultiBlock3d {
public:
  // False where a clip was left no context in MAX_TRIES draws.
  bool add(const MultiBlock3dParams&, Random& sizes, Random& places);
  Masks rows() const;

private:
  static constexpr int MAX_TRIES = 10'000;

  int64_t frame_ = 0; // patches in it
  std::vector<PatchSets> contexts_, targets_;
};

} // namespace jepa
