// Arguments of the torch ops, as every backend reads them.
#pragma once
#include "common/tensor.h"
#include "embed_patches/embed_patches.h"

namespace jepa {

// Strides of [outer, channel, (frame,) row, column], an image being a clip of one frame.
inline void clip_strides(const Tensor& x, int64_t* strides) {
  const int frame = x.dim() - 3;
  for (int i = 0; i < 2; ++i) strides[i] = x.stride(i);
  strides[2] = frame == 2 ? x.stride(2) : 0;
  for (int i = -2; i < 0; ++i) strides[5 + i] = x.stride(i);
}

// Without the rows, scale and shift.
inline EmbedPatchesLayer layer_of(const Tensor& pixels, const Tensor& weight) {
  const bool clip = pixels.dim() == 5, tubes = weight.dim() == 5;
  EmbedPatchesLayer layer{};
  layer.channels = weight.size(1);
  layer.tubelet = clip ? weight.size(2) : 1;
  layer.patch = weight.size(-1);
  layer.grid_t = clip ? pixels.size(2) / layer.tubelet : 1;
  layer.grid_h = pixels.size(-2) / layer.patch;
  layer.grid_w = pixels.size(-1) / layer.patch;
  layer.embed_dim = weight.size(0);
  layer.pixels = pixels.data();
  layer.weight = weight.data();
  layer.copies = tubes && !clip ? weight.size(2) : 1;
  layer.dtype = weight.dtype;
  layer.pixel_dtype = pixels.dtype;
  clip_strides(pixels, layer.pixel_strides);
  clip_strides(weight, layer.weight_strides);
  return layer;
}

void bind_embed_patches_cuda(py::module_& m);

} // namespace jepa
