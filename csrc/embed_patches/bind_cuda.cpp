#if JEPA_CUDA
#include "embed_patches/arguments.h"

#include <algorithm>
#include <stdexcept>

namespace jepa {

using namespace embed_patches;
using Maybe = std::optional<Tensor>;
using Numbers = std::vector<double>;

// cu_seqlens stays on the device: kernels bound what they read by it.
static KeptRows rows_of(const Tensor& pixels, const Maybe& ids, const Maybe& cu, int64_t count) {
  const int64_t batch = pixels.size(0);
  if (!ids) return {nullptr, nullptr, batch, count, batch * count, batch, count};
  return {ids->data<int64_t>(),
          cu ? cu->data<int32_t>() : nullptr,
          cu ? cu->size(0) - 1 : ids->size(0),
          cu ? 0 : ids->size(1),
          ids->numel(),
          batch,
          count};
}

static bool contiguous(const Tensor& x) {
  int64_t step = 1;
  for (int i = x.dim() - 1; i >= 0; step *= x.size(i--))
    if (x.size(i) != 1 && x.stride(i) != step) return false;
  return true;
}

// What memory depends on. The public function has checked it; the torch op can be called without.
static void require(bool holds, const char* what) {
  if (!holds)
    throw std::invalid_argument(std::string("embed_patches: ") + what + "; call the public function");
}

// With the workspace of the folded weight, where it needs one.
static EmbedPatchesCudaLayer cuda_layer_of(const Tensor& pixels, const Maybe& ids, const Tensor& weight,
                                           const Maybe& cu, const Numbers& scale, const Numbers& shift,
                                           Tensor& folded) {
  require(scale.size() <= MAX_CHANNELS, "mean and std must be of at most 64 channels");
  require(weight.dtype == DType::bf16 || weight.dtype == DType::f16, "weight must be bf16 or fp16");
  EmbedPatchesCudaLayer layer{};
  static_cast<EmbedPatchesLayer&>(layer) = layer_of(pixels, weight);
  layer.at = rows_of(pixels, ids, cu, layer.count());
  require(layer.at.rows < int64_t{1} << 31, "ids must be fewer than 2^31");
  layer.normalised = !scale.empty();
  std::copy(scale.begin(), scale.end(), layer.scales);
  std::copy(shift.begin(), shift.end(), layer.shifts);
  folded =
      layer.copies == 1 && contiguous(weight) ? weight : weight.new_empty({layer.embed_dim, layer.depth()});
  layer.folded = folded.data();
  return layer;
}

static Tensor forward_cuda(const Tensor& pixels, const Maybe& ids, const Tensor& weight, const Maybe& bias,
                           const Maybe& pos, const Maybe& cu, const Numbers& scale, const Numbers& shift) {
  Tensor folded;
  EmbedPatchesCudaForwardParams p{};
  p.layer = cuda_layer_of(pixels, ids, weight, cu, scale, shift, folded);
  const KeptRows& at = p.layer.at;
  const Tensor out = cu ? weight.new_empty({at.rows, p.layer.embed_dim})
                        : weight.new_empty({at.sequences, at.run_length, p.layer.embed_dim});
  if (bias) {
    p.bias = bias->data();
    p.bias_stride = bias->stride(0);
  }
  if (pos) {
    p.pos = pos->data();
    p.pos_strides[0] = pos->stride(0);
    p.pos_strides[1] = pos->stride(1);
  }
  p.out = out.data();
  p.device = pixels.device_index();
  p.stream = pixels.stream();
  embed_patches_forward_cuda(p);
  return out;
}

static std::array<Tensor, 4> backward_cuda(const Tensor& grad, const Tensor& pixels, const Maybe& ids,
                                           const Tensor& weight, const Maybe& cu, const Numbers& scale,
                                           const Numbers& shift, std::array<bool, 4> wanted) {
  Tensor folded;
  EmbedPatchesCudaBackwardParams p{};
  p.layer = cuda_layer_of(pixels, ids, weight, cu, scale, shift, folded);
  const int64_t rows = p.layer.at.rows, embed_dim = p.layer.embed_dim;
  const auto empty = [&](int i, std::vector<int64_t> shape, void*& data) {
    const Tensor x = grad.new_empty(wanted[i] ? shape : std::vector<int64_t>{0});
    data = wanted[i] ? x.data() : nullptr;
    return x;
  };
  const std::array<Tensor, 4> found{empty(0, pixels.shape(), p.dpixels), empty(1, weight.shape(), p.dweight),
                                    empty(2, {embed_dim}, p.dbias),
                                    empty(3, {p.layer.at.count, embed_dim}, p.dpos)};
  if (wanted[0]) clip_strides(found[0], p.dpixel_strides);
  const Tensor places = grad.new_empty({rows}, DType::i64);
  const Tensor weight_sums =
      grad.new_empty({wanted[1] ? weight_parts(rows) * embed_dim * p.layer.depth() : 0}, DType::f32);
  const Tensor bias_sums =
      grad.new_empty({wanted[2] ? padded(rows, BIAS_ROWS) / BIAS_ROWS * embed_dim : 0}, DType::f32);
  p.grad = grad.data();
  p.grad_length = grad.size(-2);
  p.grad_strides[0] = grad.dim() == 3 ? grad.stride(0) : 0;
  p.grad_strides[1] = grad.stride(-2);
  p.grad_strides[2] = grad.stride(-1);
  p.places = places.data<int64_t>();
  p.weight_sums = weight_sums.data<float>();
  p.bias_sums = bias_sums.data<float>();
  p.device = pixels.device_index();
  p.stream = pixels.stream();
  embed_patches_backward_cuda(p);
  return found;
}

void bind_embed_patches_cuda(py::module_& m) {
  m.def("embed_patches_forward_cuda", &forward_cuda);
  m.def("embed_patches_backward_cuda", &backward_cuda);
}

} // namespace jepa
#endif
