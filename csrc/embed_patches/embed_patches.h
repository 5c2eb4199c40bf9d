// out[row] = W patch(row) + bias + position(row) for kept patches, and its gradients.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"
#include "../common/dtype.h"
#include "../common/rows.h"

namespace jepa {

// Sizes that every instruction set shares; workspaces are rounded up by them.
namespace embed_patches {
constexpr int64_t TILE_ROWS = 48; // rows of the left operand that are multiplied with one panel of the right
constexpr int64_t MAX_COLUMNS = 32; // the widest right panel
constexpr int64_t MAX_ROWS = 12;    // the widest left panel
constexpr int64_t TOKENS = 1024; // the most tokens that are multiplied into the weights' gradient at a time

constexpr int64_t padded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// A row that is read in whole registers and cut into whole panels.
constexpr int64_t row_size(int64_t n) { return padded(n, MAX_COLUMNS) + MAX_COLUMNS; }
constexpr int64_t forward_scratch(int64_t depth) { return TILE_ROWS * depth + MAX_COLUMNS * row_size(depth); }
constexpr int64_t backward_scratch(int64_t depth, int64_t embed_dim) {
  return TILE_ROWS * (embed_dim + row_size(depth)) +
         MAX_ROWS * row_size(depth > embed_dim ? depth : embed_dim);
}
} // namespace embed_patches

// A patch is channels x tubelet x patch x patch pixels of one image or clip; an image is a clip of one frame.
struct EmbedPatchesLayer {
  KeptRows at;
  int64_t channels, tubelet, patch, grid_h, grid_w, embed_dim;
  const void* pixels;
  int64_t pixel_strides[5]; // clip, channel, frame, row, column
  const void* weight;
  int64_t weight_strides[5];  // embedding, channel, frame, row, column
  int64_t copies;             // frames of the weight that are summed into one: an image shown as a clip
  const float *scale, *shift; // a channel's pixels x are read as scale x + shift; null: as they are
  DType dtype, pixel_dtype;   // pixel_dtype: dtype or u8
  int threads;

  int64_t depth() const { return channels * tubelet * patch * patch; } // the pixels of a patch
};

struct EmbedPatchesForwardParams {
  EmbedPatchesLayer layer;
  const void* bias; // may be null, as pos
  int64_t bias_stride;
  const void* pos;
  int64_t pos_strides[2];
  void* out;      // [rows, embed_dim]
  int64_t* token; // workspace [rows]
  float* weights; // workspace [padded(embed_dim, MAX_COLUMNS), depth]
  float* scratch; // workspace [threads, scratch_size]
  int64_t scratch_size;
};

struct EmbedPatchesBackwardParams {
  EmbedPatchesLayer layer;
  const void* grad;
  int64_t grad_strides[3];                // run (where runs have one length), row, embedding
  void *dpixels, *dweight, *dbias, *dpos; // contiguous; null where not wanted; dpixels is full of zeros
  float* dweight_sum;                     // [embed_dim, depth]: dweight itself where that is it
  int32_t* first;                         // workspace [batch * count + 1], see sort_rows
  int32_t* source;                        // workspace [rows]
  int64_t* token;                         // workspace [rows]
  float* left;                            // workspace [padded(embed_dim, TILE_ROWS), TOKENS]
  float* right;                           // workspace [padded(depth, MAX_COLUMNS), max(TOKENS, embed_dim)]
  float* scratch;                         // workspace [threads, scratch_size]
  int64_t scratch_size;
};

JEPA_DECLARE_CPU(embed_patches_forward_cpu, EmbedPatchesForwardParams)
JEPA_DECLARE_CPU(embed_patches_backward_cpu, EmbedPatchesBackwardParams)

} // namespace jepa
