// What the CUDA kernels share: where patches lie, and products of 128 x 128 tiles on tensor cores, whose
// operands are gathered into shared memory 32 of the summed dimension at a time.
#pragma once
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>

#include "common/floats.cuh"
#include "common/hopper_host.cuh"
#include "common/mma.cuh"
#include "embed_patches/embed_patches.h"

namespace jepa::embed_patches {

constexpr int THREADS = 256, TILE = 128, STEP = 32, CHUNK = 8;

// A multiprocessor's blocks that registers must allow, where so many elements are read as one.
constexpr int blocks_of(int width) { return width > 1 ? 2 : 1; }

using jepa::widen;
__device__ inline float widen(uint8_t x) { return x; }

constexpr int64_t tiles_of(int64_t n, int64_t size = TILE) { return (n + size - 1) / size; }

// Offset within an image of the first pixel of patch `token`.
__device__ inline int64_t patch_offset(const EmbedPatchesLayer& l, const int64_t* strides, int64_t token) {
  const int64_t plane = l.grid_h * l.grid_w;
  return token / plane * l.tubelet * strides[2] + token % plane / l.grid_w * l.patch * strides[3] +
         token % l.grid_w * l.patch * strides[4];
}

// Offset within a patch of its element k.
__device__ inline int64_t pixel_offset(const EmbedPatchesLayer& l, const int64_t* strides, int k) {
  const int side = static_cast<int>(l.patch), frames = static_cast<int>(l.tubelet);
  return k / (side * side * frames) * strides[1] + k / (side * side) % frames * strides[2] +
         k / side % side * strides[3] + k % side * strides[4];
}

__device__ inline int channel_of(const EmbedPatchesLayer& l, int k) {
  return k / static_cast<int>(l.tubelet * l.patch * l.patch);
}

constexpr int64_t NOWHERE = -1;

struct Place {
  int64_t first, token; // first: offset of the patch's first pixel, or NOWHERE
};

// The run that holds a row: the first that ends behind it.
__device__ inline int64_t run_of(const KeptRows& at, int64_t row) {
  if (!at.cu_seqlens) return row / at.run_length;
  int64_t low = 0, high = at.sequences;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (at.cu_seqlens[middle + 1] <= row)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

__device__ inline Place place_of(const EmbedPatchesLayer& l, int64_t row) {
  const KeptRows& at = l.at;
  if (row >= at.rows) return {NOWHERE, 0};
  const int64_t run = run_of(at, row);
  if (run >= at.sequences) return {NOWHERE, 0};
  const int64_t token = at.ids ? at.ids[row] : row - run * at.run_length;
  if (token < 0 || token >= at.count) return {NOWHERE, 0};
  return {run % at.batch * l.pixel_strides[0] + patch_offset(l, l.pixel_strides, token), token};
}

// The row of a run that stands for a token, found in its increasing ids; -1 if none does.
__device__ inline int row_of(const KeptRows& at, int64_t run, int64_t token) {
  int64_t low = run * at.run_length, end = low + at.run_length;
  if (!at.ids) return static_cast<int>(low + token);
  if (at.cu_seqlens) {
    low = at.cu_seqlens[run] < 0 ? 0 : at.cu_seqlens[run];
    end = at.cu_seqlens[run + 1] < at.rows ? at.cu_seqlens[run + 1] : at.rows;
  }
  for (int64_t high = end; low < high;) {
    const int64_t middle = (low + high) / 2;
    if (at.ids[middle] < token)
      low = middle + 1;
    else
      high = middle;
  }
  return low < end && at.ids[low] == token ? static_cast<int>(low) : -1;
}

// Element k of patches: where it lies and what it is multiplied by.
struct Pixel {
  int64_t offset; // NOWHERE past the last
  float scale, shift;
};

__device__ inline Pixel pixel_of(const EmbedPatchesCudaLayer& l, int k) {
  if (k >= l.depth()) return {NOWHERE, 0.f, 0.f};
  const int c = channel_of(l, k);
  return {pixel_offset(l, l.pixel_strides, k), l.normalised ? l.scales[c] : 1.f,
          l.normalised ? l.shifts[c] : 0.f};
}

template <int bytes>
using Word = std::conditional_t<
    bytes == 16, uint4,
    std::conditional_t<
        bytes == 8, uint2,
        std::conditional_t<bytes == 4, uint32_t, std::conditional_t<bytes == 2, uint16_t, uint8_t>>>>;

// 4096 elements on their way to shared memory, `columns` a line: two chunks of 8 a thread, read `width`
// elements a load. T: what the product takes; From: what memory holds.
template <class T, class From, int columns, int width> struct Tile {
  static constexpr int per_line = columns / CHUNK, stride = columns + CHUNK, lines = 4096 / columns;
  static constexpr int size = lines * stride;
  using Load = Word<width * sizeof(From)>;
  Load words[2][CHUNK / width];

  static __device__ int line(int i) { return threadIdx.x / per_line + i * (lines / 2); }
  static __device__ int column() { return threadIdx.x % per_line * CHUNK; }

  // at(line, column): the address of `width` elements, or null for zeros.
  template <class At> __device__ void load(const At& at) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int c = 0; c < CHUNK; c += width) {
        const From* from = at(line(i), column() + c);
        words[i][c / width] = from ? __ldg(reinterpret_cast<const Load*>(from)) : Load{};
      }
  }
  __device__ void store(T* shared) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) memcpy(shared + line(i) * stride + column(), words[i], CHUNK * sizeof(T));
  }
  // Normalised in fp32, by the pixels of these columns.
  __device__ void store(T* shared, const Pixel* pixels) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      From from[CHUNK];
      alignas(16) T to[CHUNK];
      memcpy(from, words[i], sizeof(from));
#pragma unroll
      for (int c = 0; c < CHUNK; ++c) {
        const Pixel& pixel = pixels[column() + c / width * width]; // of one channel
        narrow(__fmaf_rn(widen(from[c]), pixel.scale, pixel.shift), to[c]);
      }
      memcpy(shared + line(i) * stride + column(), to, sizeof(to));
    }
  }
};

// How an operand lies in shared memory: its lines along the summed dimension, or across it.
enum class Lines { along, across };

// Sums [m, n] of a block: each of its 8 warps holds 32 x 64 of them.
template <class T, Lines left_lines, Lines right_lines> struct Product {
  static constexpr bool left_across = left_lines == Lines::across,
                        right_across = right_lines == Lines::across;
  static constexpr int left_stride = (left_across ? TILE : STEP) + CHUNK;
  static constexpr int right_stride = (right_across ? TILE : STEP) + CHUNK;
  float sums[2][8][4] = {};

  static __device__ int row() { return threadIdx.x / 32 / 2 * 32; }
  static __device__ int column() { return threadIdx.x / 32 % 2 * 64; }

  __device__ void add(const T* left, const T* right) {
    // Where this lane's line of 16 x 16 elements begins: see load_matrices.
    const int low = threadIdx.x % 16, high = threadIdx.x % 32 / 16 * 8;
    const int inner = threadIdx.x % 8 + high, outer = threadIdx.x / 8 % 2 * 8;
#pragma unroll 1 // else more operands are read ahead than there are registers
    for (int k = 0; k < STEP; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int m = row() + 16 * i;
        load_matrices<left_across>(a[i], left_across ? left + (k + inner) * left_stride + m + outer
                                                     : left + (m + low) * left_stride + k + high);
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const int n = column() + 8 * j;
        uint32_t b[4];
        load_matrices<right_across>(b, right_across ? right + (k + low) * right_stride + n + high
                                                    : right + (n + inner) * right_stride + k + outer);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          multiply_add<T>(sums[i / 2][j + i % 2], a[i / 2], b[i % 2 * 2], b[i % 2 * 2 + 1]);
      }
    }
  }

  // visit(m, n, sum)
  template <class Visit> __device__ void each(const Visit& visit) const {
    const int m = row() + threadIdx.x % 32 / 4, n = column() + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) visit(m + 16 * i + k / 2 * 8, n + 8 * j + k % 2, sums[i][j][k]);
  }
};

// The next step's operands are read while this step's are multiplied.
template <class T, Lines left_lines, Lines right_lines, class Load, class Store>
__device__ void multiply(Product<T, left_lines, right_lines>& product, int steps, const T* left,
                         const T* right, const Load& load, const Store& store) {
  if (steps > 0) load(0);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    store(step);
    __syncthreads();
    if (step + 1 < steps) load(step + 1);
    product.add(left, right);
    __syncthreads();
  }
}

// Whether `width` elements of a line can be read as one.
inline bool divides(int64_t width, const void* data, int64_t bytes, std::initializer_list<int64_t> strides) {
  bool fits = reinterpret_cast<uintptr_t>(data) % (width * bytes) == 0;
  for (const int64_t stride : strides) fits &= stride % width == 0;
  return fits;
}
inline bool pixels_fit(const EmbedPatchesLayer& l, int64_t width) {
  const int64_t* s = l.pixel_strides;
  return s[4] == 1 &&
         divides(width, l.pixels, l.pixel_dtype == DType::u8 ? 1 : 2, {l.patch, s[0], s[1], s[2], s[3]});
}

inline const char* OP = "embed_patches";

void embed_patches_fold_cuda(const EmbedPatchesCudaLayer& layer, int device, void* stream);

} // namespace jepa::embed_patches
