// One launch, two where the weight must be folded: a block multiplies 128 rows with 128 outputs.
#include "embed_patches/tile.cuh"

namespace jepa::embed_patches {

template <class T, class P, int width>
__global__ void __launch_bounds__(THREADS, blocks_of(width))
    embed_patches_forward_cuda_kernel(const __grid_constant__ EmbedPatchesCudaForwardParams p) {
  using Pixels = Tile<T, P, STEP, width>;
  using Weights = Tile<T, T, STEP, width>;
  using Sums = Product<T, Lines::along, Lines::along>;
  __shared__ Place places[TILE];
  __shared__ Pixel table[2][STEP];
  alignas(16) __shared__ T left[Pixels::size];
  alignas(16) __shared__ T right[Weights::size];

  // Blocks of the same rows run side by side: their pixels come from the L2 cache.
  const EmbedPatchesCudaLayer& l = p.layer;
  const int embed_dim = static_cast<int>(l.embed_dim), depth = static_cast<int>(l.depth());
  const int tiles = static_cast<int>(tiles_of(embed_dim)), begin = blockIdx.x % tiles * TILE;
  const int64_t first_row = int64_t{blockIdx.x / tiles} * TILE;
  if (threadIdx.x < TILE) places[threadIdx.x] = place_of(l, first_row + threadIdx.x);
  if (threadIdx.x < STEP) table[0][threadIdx.x] = pixel_of(l, threadIdx.x);
  __syncthreads();

  Pixels x;
  Weights w;
  const auto load = [&](int step) {
    x.load([&](int line, int k) -> const P* {
      const int64_t first = places[line].first, offset = table[step % 2][k].offset;
      return first < 0 || offset < 0 ? nullptr : static_cast<const P*>(l.pixels) + first + offset;
    });
    w.load([&](int line, int column) -> const T* {
      const int e = begin + line, k = step * STEP + column;
      if (e >= embed_dim || k >= depth) return nullptr;
      return static_cast<const T*>(l.folded) + int64_t{e} * depth + k;
    });
  };
  const auto store = [&](int step) {
    if (std::is_same_v<P, uint8_t> || l.normalised)
      x.store(left, table[step % 2]);
    else if constexpr (std::is_same_v<P, T>)
      x.store(left);
    w.store(right);
    if (threadIdx.x < STEP) table[(step + 1) % 2][threadIdx.x] = pixel_of(l, (step + 1) * STEP + threadIdx.x);
  };
  Sums sums;
  multiply(sums, static_cast<int>(tiles_of(depth, STEP)), left, right, load, store);
  sums.each([&](int m, int n, float sum) {
    const int e = begin + n;
    if (first_row + m >= l.at.rows || e >= embed_dim) return;
    const Place place = places[m];
    if (p.bias) sum += widen(__ldg(static_cast<const T*>(p.bias) + e * p.bias_stride));
    if (p.pos && place.first >= 0)
      sum +=
          widen(__ldg(static_cast<const T*>(p.pos) + place.token * p.pos_strides[0] + e * p.pos_strides[1]));
    narrow(place.first < 0 ? 0.f : sum, static_cast<T*>(p.out)[(first_row + m) * embed_dim + e]);
  });
}

// [E, C, Pt, P, P] of any strides to [E, K]; an image shown as equal frames sees the sum of their weights.
template <class T>
__global__ void __launch_bounds__(THREADS)
    embed_patches_fold_cuda_kernel(const __grid_constant__ EmbedPatchesCudaLayer l) {
  const int64_t i = int64_t{blockIdx.x} * THREADS + threadIdx.x, depth = l.depth();
  if (i >= l.embed_dim * depth) return;
  const T* from = static_cast<const T*>(l.weight) + i / depth * l.weight_strides[0] +
                  pixel_offset(l, l.weight_strides, static_cast<int>(i % depth));
  float sum = 0.f;
  for (int64_t t = 0; t < l.copies; ++t) sum += widen(__ldg(from + t * l.weight_strides[2]));
  narrow(sum, static_cast<T*>(l.folded)[i]);
}

template <class T> static void fold(const EmbedPatchesCudaLayer& l, int device, void* stream) {
  const int64_t blocks = tiles_of(l.embed_dim * l.depth(), THREADS);
  launch(OP, embed_patches_fold_cuda_kernel<T>, {blocks, THREADS, 0, device, stream}, l);
}

void embed_patches_fold_cuda(const EmbedPatchesCudaLayer& l, int device, void* stream) {
  if (l.folded == l.weight) return;
  if (l.dtype == DType::bf16) return fold<__nv_bfloat16>(l, device, stream);
  fold<__half>(l, device, stream);
}

template <class T, class P, int width> static void launch_width(const EmbedPatchesCudaForwardParams& p) {
  const int64_t blocks = tiles_of(p.layer.at.rows) * tiles_of(p.layer.embed_dim);
  launch(OP, embed_patches_forward_cuda_kernel<T, P, width>, {blocks, THREADS, 0, p.device, p.stream}, p);
}

template <class T, class P> static void launch_pixels(const EmbedPatchesCudaForwardParams& p) {
  const auto fits = [&](int64_t width) {
    return pixels_fit(p.layer, width) && divides(width, p.layer.folded, sizeof(T), {p.layer.depth()});
  };
  if (fits(8)) return launch_width<T, P, 8>(p);
  if (fits(2)) return launch_width<T, P, 2>(p);
  launch_width<T, P, 1>(p);
}

template <class T> static void launch_type(const EmbedPatchesCudaForwardParams& p) {
  if (p.layer.pixel_dtype == DType::u8) return launch_pixels<T, uint8_t>(p);
  launch_pixels<T, T>(p);
}

} // namespace jepa::embed_patches

namespace jepa {

void embed_patches_forward_cuda(const EmbedPatchesCudaForwardParams& p) {
  if (p.layer.at.rows == 0 || p.layer.embed_dim == 0) return;
  if (p.layer.dtype != DType::bf16 && p.layer.dtype != DType::f16) refuse(p.layer.dtype);
  embed_patches::embed_patches_fold_cuda(p.layer, p.device, p.stream);
  if (p.layer.dtype == DType::bf16) return embed_patches::launch_type<__nv_bfloat16>(p);
  embed_patches::launch_type<__half>(p);
}

} // namespace jepa
