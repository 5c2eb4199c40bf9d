#include "embed_patches/embed_patches.h"

#include <vector>

#include "common/tensor.h"

namespace jepa {

using namespace embed_patches;
using Maybe = std::optional<Tensor>;

static EmbedPatchesLayer layer_of(const Tensor& pixels, const Maybe& ids, const Tensor& weight,
                                  const Runs& runs) {
  const int64_t patch = weight.size(2), grid_w = pixels.size(3) / patch;
  EmbedPatchesLayer layer{kept_rows(ids, runs, pixels.size(0), pixels.size(2) / patch * grid_w),
                          weight.size(1),
                          patch,
                          grid_w,
                          weight.size(0),
                          pixels.data(),
                          {},
                          weight.data(),
                          {},
                          pixels.dtype,
                          torch_threads()};
  std::copy_n(pixels.strides.begin(), 4, layer.pixel_strides);
  std::copy_n(weight.strides.begin(), 4, layer.weight_strides);
  return layer;
}

static Tensor forward_cpu(const Tensor& pixels, const Maybe& ids, const Tensor& weight, const Maybe& bias,
                          const Maybe& pos, const Maybe& cu, const std::vector<double>&,
                          const std::vector<double>&) {
  const Runs runs(cu, ids ? ids->numel() : 0);
  const EmbedPatchesLayer layer = layer_of(pixels, ids, weight, runs);
  const int64_t depth = layer.depth(), embed_dim = layer.embed_dim, scratch_size = forward_scratch(depth);
  const Tensor out = cu ? pixels.new_empty({layer.at.rows, embed_dim})
                        : pixels.new_empty({layer.at.sequences, layer.at.run_length, embed_dim});
  const Tensor weights = pixels.new_empty({padded(embed_dim, MAX_COLUMNS) * depth}, DType::f32);
  const Tensor scratch = pixels.new_empty({layer.threads * scratch_size}, DType::f32);
  std::vector<int64_t> token(layer.at.rows);
  const EmbedPatchesForwardParams params{layer,
                                         bias ? bias->data() : nullptr,
                                         bias ? bias->stride(0) : 0,
                                         pos ? pos->data() : nullptr,
                                         {pos ? pos->stride(0) : 0, pos ? pos->stride(1) : 0},
                                         out.data(),
                                         token.data(),
                                         weights.data<float>(),
                                         scratch.data<float>(),
                                         scratch_size};
  py::gil_scoped_release nogil;
  embed_patches_forward_cpu(params);
  return out;
}

static std::array<Tensor, 4> backward_cpu(const Tensor& grad, const Tensor& pixels, const Maybe& ids,
                                          const Tensor& weight, const Maybe& cu, const std::vector<double>&,
                                          const std::vector<double>&, std::array<bool, 4> wanted) {
  const Runs runs(cu, ids ? ids->numel() : 0);
  const EmbedPatchesLayer layer = layer_of(pixels, ids, weight, runs);
  const int64_t depth = layer.depth(), embed_dim = layer.embed_dim, count = layer.at.count;
  const Tensor none = grad.new_empty({0});
  const std::array<Tensor, 4> found{
      wanted[0] ? grad.new_zeros({layer.at.batch, pixels.size(1), pixels.size(2), pixels.size(3)}) : none,
      wanted[1] ? grad.new_empty({embed_dim, layer.channels, layer.patch, layer.patch}) : none,
      wanted[2] ? grad.new_empty({embed_dim}) : none, wanted[3] ? grad.new_empty({count, embed_dim}) : none};
  const bool rounded = wanted[1] && layer.dtype != DType::f32;
  const Tensor sum = rounded ? grad.new_empty({embed_dim * depth}, DType::f32) : found[1];
  const Tensor left = grad.new_empty({padded(embed_dim, TILE_ROWS) * TOKENS}, DType::f32);
  const Tensor right = grad.new_empty({padded(depth, MAX_COLUMNS) * std::max(TOKENS, embed_dim)}, DType::f32);
  const int64_t scratch_size = backward_scratch(depth, embed_dim);
  const Tensor scratch = grad.new_empty({layer.threads * scratch_size}, DType::f32);
  std::vector<int32_t> first(layer.at.batch * count + 1), source(layer.at.rows);
  std::vector<int64_t> token(layer.at.rows);
  const auto data = [&](int i) { return wanted[i] ? found[i].data() : nullptr; };
  const EmbedPatchesBackwardParams params{
      layer,
      grad.data(),
      {grad.dim() == 3 ? grad.stride(0) : 0, grad.stride(-2), grad.stride(-1)},
      data(0),
      data(1),
      data(2),
      data(3),
      sum.data<float>(),
      first.data(),
      source.data(),
      token.data(),
      left.data<float>(),
      right.data<float>(),
      scratch.data<float>(),
      scratch_size};
  py::gil_scoped_release nogil;
  embed_patches_backward_cpu(params);
  return found;
}

void bind_embed_patches(py::module_& m) {
  m.def("embed_patches_forward_cpu", &forward_cpu);
  m.def("embed_patches_backward_cpu", &backward_cpu);
}

} // namespace jepa
