#include "embed_patches/embed_patches.h"

#include <vector>

#include "common/tensor.h"

namespace jepa {
namespace embed_patches_bindings {

using namespace embed_patches;
using Maybe = std::optional<Tensor>;
using Numbers = std::vector<double>;

// One number a channel, in the kernels' precision; null where there is none.
class Channels {
public:
  Channels(const Numbers& values, int64_t channels) : values_(values.begin(), values.end()) {
    if (!values.empty()) values_.resize(channels); // wrong numbers, but no access outside
  }
  const float* data() const { return values_.empty() ? nullptr : values_.data(); }

private:
  std::vector<float> values_;
};

// Strides of [outer, channel, (frame,) row, column], an image being a clip of one frame.
static void clip_strides(const Tensor& x, int64_t* strides) {
  const int frame = x.dim() - 3;
  for (int i = 0; i < 2; ++i) strides[i] = x.stride(i);
  strides[2] = frame == 2 ? x.stride(2) : 0;
  for (int i = -2; i < 0; ++i) strides[5 + i] = x.stride(i);
}

static EmbedPatchesLayer layer_of(const Tensor& pixels, const Maybe& ids, const Tensor& weight,
                                  const Runs& runs, const Channels& scale, const Channels& shift) {
  const bool clip = pixels.dim() == 5, tubes = weight.dim() == 5;
  EmbedPatchesLayer layer{};
  layer.channels = weight.size(1);
  layer.tubelet = clip ? weight.size(2) : 1;
  layer.patch = weight.size(-1);
  layer.grid_h = pixels.size(-2) / layer.patch;
  layer.grid_w = pixels.size(-1) / layer.patch;
  layer.embed_dim = weight.size(0);
  layer.pixels = pixels.data();
  layer.weight = weight.data();
  layer.copies = tubes && !clip ? weight.size(2) : 1;
  layer.scale = scale.data();
  layer.shift = shift.data();
  layer.dtype = weight.dtype;
  layer.pixel_dtype = pixels.dtype;
  layer.threads = torch_threads();
  clip_strides(pixels, layer.pixel_strides);
  clip_strides(weight, layer.weight_strides);
  const int64_t grid_t = clip ? pixels.size(2) / layer.tubelet : 1;
  layer.at = kept_rows(ids, runs, pixels.size(0), grid_t * layer.grid_h * layer.grid_w);
  return layer;
}

static Tensor forward_cpu(const Tensor& pixels, const Maybe& ids, const Tensor& weight, const Maybe& bias,
                          const Maybe& pos, const Maybe& cu, const Numbers& scale, const Numbers& shift) {
  const Runs runs(cu, ids ? ids->numel() : 0);
  const Channels scales(scale, weight.size(1)), shifts(shift, weight.size(1));
  const EmbedPatchesLayer layer = layer_of(pixels, ids, weight, runs, scales, shifts);
  const int64_t depth = layer.depth(), embed_dim = layer.embed_dim, scratch_size = forward_scratch(depth);
  const Tensor out = cu ? weight.new_empty({layer.at.rows, embed_dim})
                        : weight.new_empty({layer.at.sequences, layer.at.run_length, embed_dim});
  const Tensor weights = weight.new_empty({padded(embed_dim, MAX_COLUMNS) * depth}, DType::f32);
  const Tensor scratch = weight.new_empty({layer.threads * scratch_size}, DType::f32);
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
                                          const Tensor& weight, const Maybe& cu, const Numbers& scale,
                                          const Numbers& shift, std::array<bool, 4> wanted) {
  const Runs runs(cu, ids ? ids->numel() : 0);
  const Channels scales(scale, weight.size(1)), shifts(shift, weight.size(1));
  const EmbedPatchesLayer layer = layer_of(pixels, ids, weight, runs, scales, shifts);
  const int64_t depth = layer.depth(), embed_dim = layer.embed_dim, count = layer.at.count;
  const auto none = [&] { return grad.new_empty({0}); }; // a new one each time: outputs must not alias
  const std::array<Tensor, 4> found{wanted[0] ? grad.new_zeros(pixels.shape()) : none(),
                                    wanted[1] ? grad.new_empty(weight.shape()) : none(),
                                    wanted[2] ? grad.new_empty({embed_dim}) : none(),
                                    wanted[3] ? grad.new_empty({count, embed_dim}) : none()};
  const bool apart = wanted[1] && (layer.dtype != DType::f32 || layer.copies > 1);
  const Tensor sum = apart ? grad.new_empty({embed_dim * depth}, DType::f32) : found[1];
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

} // namespace embed_patches_bindings

void bind_embed_patches(py::module_& m) {
  using namespace embed_patches_bindings;
  m.def("embed_patches_forward_cpu", &forward_cpu);
  m.def("embed_patches_backward_cpu", &backward_cpu);
}

} // namespace jepa
