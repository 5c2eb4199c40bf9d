// Gradients. Every sum has a fixed order: rows in parts whose number depends on how many rows there are, then
// the parts; no atomics.
#include "embed_patches/tile.cuh"

namespace jepa::embed_patches {

using Params = EmbedPatchesCudaBackwardParams;

template <class T> __device__ const T* gradient(const Params& p, int row, int e) {
  const int64_t run = row / p.grad_length, rest = row - run * p.grad_length;
  return static_cast<const T*>(p.grad) + run * p.grad_strides[0] + rest * p.grad_strides[1] +
         e * p.grad_strides[2];
}

static __global__ void __launch_bounds__(THREADS)
    embed_patches_backward_places_cuda_kernel(const __grid_constant__ Params p) {
  const int row = blockIdx.x * THREADS + threadIdx.x;
  if (row < p.layer.at.rows) p.places[row] = place_of(p.layer, row).first;
}

// A part of dweight: grad^T x patches over `share` rows.
struct WeightArgs {
  Params p;
  int share;
};

template <class T, class P, int width>
__global__ void __launch_bounds__(THREADS, blocks_of(width))
    embed_patches_backward_weight_cuda_kernel(const __grid_constant__ WeightArgs args) {
  using Gradients = Tile<T, T, TILE, width>;
  using Pixels = Tile<T, P, TILE, width>;
  using Sums = Product<T, Lines::across, Lines::across>;
  __shared__ Pixel table[TILE];
  alignas(16) __shared__ T left[Gradients::size];
  alignas(16) __shared__ T right[Pixels::size];

  const Params& p = args.p;
  const EmbedPatchesCudaLayer& l = p.layer;
  const int embed_dim = static_cast<int>(l.embed_dim), depth = static_cast<int>(l.depth());
  const int wide = static_cast<int>(tiles_of(depth)), tiles = static_cast<int>(tiles_of(embed_dim)) * wide;
  const int part = blockIdx.x / tiles;
  const int tile = blockIdx.x % tiles, first_e = tile / wide * TILE, first_k = tile % wide * TILE;
  const int begin = part * args.share, rest = static_cast<int>(l.at.rows) - begin;
  const int count = rest < args.share ? rest : args.share;
  if (threadIdx.x < TILE) table[threadIdx.x] = pixel_of(l, first_k + threadIdx.x);
  __syncthreads();

  Gradients g;
  Pixels x;
  const auto load = [&](int step) {
    const auto place = [&](int line) {
      const int row = step * STEP + line;
      return row < count ? __ldg(p.places + begin + row) : NOWHERE;
    };
    g.load([&](int line, int column) -> const T* {
      const int e = first_e + column;
      if (place(line) < 0 || e >= embed_dim) return nullptr;
      return gradient<T>(p, begin + step * STEP + line, e);
    });
    x.load([&](int line, int column) -> const P* {
      const int64_t first = place(line), offset = table[column].offset;
      return first < 0 || offset < 0 ? nullptr : static_cast<const P*>(l.pixels) + first + offset;
    });
  };
  const auto store = [&](int) {
    g.store(left);
    if (std::is_same_v<P, uint8_t> || l.normalised)
      x.store(right, table);
    else if constexpr (std::is_same_v<P, T>)
      x.store(right);
  };
  Sums sums;
  multiply(sums, static_cast<int>(tiles_of(count, STEP)), left, right, load, store);
  sums.each([&](int m, int n, float sum) {
    const int e = first_e + m, k = first_k + n;
    if (e < embed_dim && k < depth) p.weight_sums[(int64_t{part} * embed_dim + e) * depth + k] = sum;
  });
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    embed_patches_backward_bias_cuda_kernel(const __grid_constant__ Params p) {
  const int tiles = static_cast<int>(tiles_of(p.layer.embed_dim, THREADS));
  const int part = blockIdx.x / tiles, begin = part * BIAS_ROWS;
  const int e = blockIdx.x % tiles * THREADS + threadIdx.x;
  if (e >= p.layer.embed_dim) return;
  float sum = 0.f;
  for (int row = begin; row < begin + BIAS_ROWS && row < p.layer.at.rows; ++row)
    if (__ldg(p.places + row) >= 0) sum += widen(__ldg(gradient<T>(p, row, e)));
  p.bias_sums[int64_t{part} * p.layer.embed_dim + e] = sum;
}

// The sum of `count` parts of `numel`; each `inner` elements are written once for each of `copies` frames.
struct SumArgs {
  const float* parts;
  void* out;
  int64_t count, numel, copies, inner;
};

template <class T>
__global__ void __launch_bounds__(THREADS)
    embed_patches_backward_sum_cuda_kernel(const __grid_constant__ SumArgs s) {
  const int64_t i = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (i >= s.numel) return;
  float sum = 0.f;
  for (int64_t part = 0; part < s.count; ++part) sum += __ldg(s.parts + part * s.numel + i);
  for (int64_t copy = 0; copy < s.copies; ++copy)
    narrow(sum, static_cast<T*>(s.out)[(i / s.inner * s.copies + copy) * s.inner + i % s.inner]);
}

// dpos_embed of one patch: the sum over the runs that keep it, which THREADS threads look up at a time.
template <class T>
__global__ void __launch_bounds__(THREADS)
    embed_patches_backward_pos_cuda_kernel(const __grid_constant__ Params p) {
  __shared__ int rows[THREADS];
  const KeptRows& at = p.layer.at;
  const int tiles = static_cast<int>(tiles_of(p.layer.embed_dim, THREADS));
  const int64_t token = blockIdx.x / tiles;
  const int e = blockIdx.x % tiles * THREADS + threadIdx.x;
  float sum = 0.f;
  for (int64_t run = 0; run < at.sequences; run += THREADS) {
    const int64_t own = run + threadIdx.x;
    rows[threadIdx.x] = own < at.sequences ? row_of(at, own, token) : -1;
    __syncthreads();
    for (int i = 0; i < THREADS && e < p.layer.embed_dim; ++i)
      if (rows[i] >= 0) sum += widen(__ldg(gradient<T>(p, rows[i], e)));
    __syncthreads();
  }
  if (e < p.layer.embed_dim) narrow(sum, static_cast<T*>(p.dpos)[token * p.layer.embed_dim + e]);
}

// dpixels of 128 patches: grad x weight, summed over the masks that keep them; 0 where none does.
template <class T, int width>
__global__ void __launch_bounds__(THREADS, blocks_of(width))
    embed_patches_backward_pixels_cuda_kernel(const __grid_constant__ Params p) {
  using Gradients = Tile<T, T, STEP, width>;
  using Weights = Tile<T, T, TILE, width>;
  using Sums = Product<T, Lines::along, Lines::across>;
  __shared__ int rows[TILE];
  alignas(16) __shared__ T left[Gradients::size];
  alignas(16) __shared__ T right[Weights::size];

  const EmbedPatchesCudaLayer& l = p.layer;
  const KeptRows& at = l.at;
  const int embed_dim = static_cast<int>(l.embed_dim), depth = static_cast<int>(l.depth());
  const int wide = static_cast<int>(tiles_of(depth)), first_k = blockIdx.x % wide * TILE;
  const int64_t first = int64_t{blockIdx.x / wide} * TILE, patches = at.batch * at.count;
  Gradients g;
  Weights w;
  const auto load = [&](int step) {
    const int begin = step * STEP;
    g.load([&](int line, int column) -> const T* {
      const int e = begin + column;
      return rows[line] < 0 || e >= embed_dim ? nullptr : gradient<T>(p, rows[line], e);
    });
    w.load([&](int line, int column) -> const T* {
      const int e = begin + line, k = first_k + column;
      if (e >= embed_dim || k >= depth) return nullptr;
      return static_cast<const T*>(l.folded) + int64_t{e} * depth + k;
    });
  };
  const auto store = [&](int) {
    g.store(left);
    w.store(right);
  };
  Sums sums;
  for (int64_t mask = 0; mask < at.sequences / at.batch; ++mask) {
    if (threadIdx.x < TILE) {
      const int64_t patch = first + threadIdx.x, run = mask * at.batch + patch / at.count;
      rows[threadIdx.x] = patch < patches ? row_of(at, run, patch % at.count) : -1;
    }
    __syncthreads();
    multiply(sums, static_cast<int>(tiles_of(embed_dim, STEP)), left, right, load, store);
  }
  sums.each([&](int m, int n, float sum) {
    const int64_t patch = first + m;
    const int k = first_k + n;
    if (patch >= patches || k >= depth) return;
    const int64_t offset = patch / at.count * p.dpixel_strides[0] +
                           patch_offset(l, p.dpixel_strides, patch % at.count) +
                           pixel_offset(l, p.dpixel_strides, k);
    narrow(l.normalised ? sum * l.scales[channel_of(l, k)] : sum, static_cast<T*>(p.dpixels)[offset]);
  });
}

template <class Args>
static void launch_blocks(void (*kernel)(Args), int64_t blocks, const Params& p, const Args& args) {
  launch(OP, kernel, {blocks, THREADS, 0, p.device, p.stream}, args);
}

template <class T>
static void add_up(const Params& p, const float* parts, void* out, int64_t count, int64_t numel,
                   int64_t copies = 1, int64_t inner = 1) {
  launch_blocks(embed_patches_backward_sum_cuda_kernel<T>, tiles_of(numel, THREADS), p,
                SumArgs{parts, out, count, numel, copies, inner});
}

static bool gradients_fit(const Params& p, int64_t width) {
  return p.grad_strides[2] == 1 &&
         divides(width, p.grad, 2, {p.layer.embed_dim, p.grad_strides[0], p.grad_strides[1]});
}

template <class T, class P> static void weight_gradient(const Params& p) {
  const EmbedPatchesCudaLayer& l = p.layer;
  const int64_t rows = l.at.rows, parts = weight_parts(rows);
  const WeightArgs args{p, static_cast<int>(tiles_of(rows, parts * STEP) * STEP)};
  const int64_t blocks = parts * tiles_of(l.embed_dim) * tiles_of(l.depth());
  const auto fits = [&](int64_t width) { return pixels_fit(l, width) && gradients_fit(p, width); };
  if (fits(8))
    launch_blocks(embed_patches_backward_weight_cuda_kernel<T, P, 8>, blocks, p, args);
  else if (fits(2))
    launch_blocks(embed_patches_backward_weight_cuda_kernel<T, P, 2>, blocks, p, args);
  else
    launch_blocks(embed_patches_backward_weight_cuda_kernel<T, P, 1>, blocks, p, args);
  add_up<T>(p, p.weight_sums, p.dweight, parts, l.embed_dim * l.depth(), l.copies, l.patch * l.patch);
}

template <class T> static void pixel_gradient(const Params& p) {
  const EmbedPatchesCudaLayer& l = p.layer;
  const int64_t blocks = tiles_of(l.at.batch * l.at.count) * tiles_of(l.depth());
  const auto fits = [&](int64_t width) {
    return gradients_fit(p, width) && divides(width, l.folded, sizeof(T), {l.depth()});
  };
  embed_patches_fold_cuda(l, p.device, p.stream);
  if (fits(8)) return launch_blocks(embed_patches_backward_pixels_cuda_kernel<T, 8>, blocks, p, p);
  if (fits(2)) return launch_blocks(embed_patches_backward_pixels_cuda_kernel<T, 2>, blocks, p, p);
  launch_blocks(embed_patches_backward_pixels_cuda_kernel<T, 1>, blocks, p, p);
}

template <class T> static void launch_type(const Params& p) {
  const int64_t rows = p.layer.at.rows, embed_dim = p.layer.embed_dim, tiles = tiles_of(embed_dim, THREADS);
  if (p.dweight || p.dbias)
    launch_blocks(embed_patches_backward_places_cuda_kernel, tiles_of(rows, THREADS), p, p);
  if (p.dpixels) pixel_gradient<T>(p);
  if (p.dweight && p.layer.pixel_dtype == DType::u8) weight_gradient<T, uint8_t>(p);
  if (p.dweight && p.layer.pixel_dtype != DType::u8) weight_gradient<T, T>(p);
  if (p.dbias) {
    const int64_t parts = tiles_of(rows, BIAS_ROWS);
    launch_blocks(embed_patches_backward_bias_cuda_kernel<T>, parts * tiles, p, p);
    add_up<T>(p, p.bias_sums, p.dbias, parts, embed_dim);
  }
  if (p.dpos) launch_blocks(embed_patches_backward_pos_cuda_kernel<T>, p.layer.at.count * tiles, p, p);
}

} // namespace jepa::embed_patches

namespace jepa {

void embed_patches_backward_cuda(const EmbedPatchesCudaBackwardParams& p) {
  if (p.layer.dtype == DType::bf16) return embed_patches::launch_type<__nv_bfloat16>(p);
  if (p.layer.dtype == DType::f16) return embed_patches::launch_type<__half>(p);
  refuse(p.layer.dtype);
}

} // namespace jepa
