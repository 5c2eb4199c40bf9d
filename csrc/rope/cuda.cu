// One launch for queries and keys. A thread keeps the turns of its channels of one token in registers and
// goes through heads with them, 16 bytes of each at a time where addresses allow.
#include "rope/rope.h"

#include <algorithm>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/floats.cuh"
#include "common/hopper_host.cuh"

namespace jepa {

constexpr unsigned THREADS = 256;
constexpr int64_t BLOCKS = 1024; // in all, at least, where there are heads to share out

// Channels c..c+count-1 of a row: 16 bytes, or one by one.
template <class T, bool wide> struct Chunk {
  static constexpr int count = wide ? 16 / sizeof(T) : 2;
  T at[count];

  __device__ void load(const T* row, int64_t stride, int c, int width) {
    if constexpr (wide) {
      const uint4 word = __ldcs(reinterpret_cast<const uint4*>(row + c));
      memcpy(at, &word, sizeof(at));
    } else {
#pragma unroll
      for (int i = 0; i < count; ++i)
        if (c + i < width) at[i] = row[(c + i) * stride];
    }
  }
  __device__ void store(T* row, int c, int width) const {
    if constexpr (wide) {
      uint4 word;
      memcpy(&word, at, sizeof(at));
      *reinterpret_cast<uint4*>(row + c) = word;
    } else {
#pragma unroll
      for (int i = 0; i < count; ++i)
        if (c + i < width) row[c + i] = at[i];
    }
  }
};

// In fp32: one fused multiply-add after a rounded product, as attention turns its rows.
template <class T> __device__ T turned(float x, float partner, float cos, float sin) {
  T y;
  narrow(__fmaf_rn(x, cos, __fmul_rn(partner, sin)), y);
  return y;
}

// A thread's channels, where partners are neighbours.
template <class T, bool wide> struct Neighbours {
  using Part = Chunk<T, wide>;
  static constexpr int count = Part::count, unroll = 2, blocks = 4; // blocks that registers must allow
  int c, width, turning;
  float cos[count], sin[count];

  __device__ Neighbours(const float* turns, const RopeParams& p)
      : c(threadIdx.x * count), width(p.width), turning(p.turning) {
#pragma unroll
    for (int i = 0; i < count; i += 2)
      if (c + i < turning) {
        const float2 cosines = *reinterpret_cast<const float2*>(turns + c + i);
        const float2 sines = *reinterpret_cast<const float2*>(turns + turning + c + i);
        cos[i] = cosines.x;
        cos[i + 1] = cosines.y;
        sin[i] = p.back ? sines.y : sines.x; // the transpose takes the sine of the partner
        sin[i + 1] = p.back ? sines.x : sines.y;
      }
  }
  __device__ Part load(const T* row, int64_t stride) const {
    Part x;
    x.load(row, stride, c, width);
    return x;
  }
  __device__ void turn_and_store(Part x, T* row) const {
#pragma unroll
    for (int i = 0; i < count; i += 2)
      if (c + i < turning) {
        const float a = widen(x.at[i]), b = widen(x.at[i + 1]);
        x.at[i] = turned<T>(a, b, cos[i], sin[i]);
        x.at[i + 1] = turned<T>(b, a, cos[i + 1], sin[i + 1]);
      }
    x.store(row, c, width);
  }
};

// A thread's channels, where partners are half of those that turn apart.
template <class T, bool wide> struct Halves {
  struct Part {
    Chunk<T, wide> first, second;
    T rest;
  };
  static constexpr int count = Chunk<T, wide>::count, unroll = 1, blocks = 3;
  int c, half, width;
  float cos[2][count], sin[2][count];

  __device__ Halves(const float* turns, const RopeParams& p)
      : c(threadIdx.x * count), half(p.turning / 2), width(p.width) {
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (c + i < half)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          cos[k][i] = turns[k * half + c + i];
          sin[k][i] = turns[(2 + (p.back ? 1 - k : k)) * half + c + i];
        }
  }
  __device__ Part load(const T* row, int64_t stride) const {
    Part x;
    x.first.load(row, stride, c, half);
    x.second.load(row + half * stride, stride, c, half);
    if (!wide && threadIdx.x == 0 && 2 * half < width) x.rest = row[2 * half * stride];
    return x;
  }
  __device__ void turn_and_store(Part x, T* row) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float a = widen(x.first.at[i]), b = widen(x.second.at[i]);
      x.first.at[i] = turned<T>(a, b, cos[0][i], sin[0][i]);
      x.second.at[i] = turned<T>(b, a, cos[1][i], sin[1][i]);
    }
    x.first.store(row, c, half);
    x.second.store(row + half, c, half);
    if (!wide && threadIdx.x == 0 && 2 * half < width) row[2 * half] = x.rest;
  }
};

// One token: its heads threadIdx.y, threadIdx.y + blockDim.y, ... of this block's share.
template <class T, class Channels>
__device__ void turn_heads(const Channels& channels, const RopeRows& r, const RopeParams& p, int64_t row) {
  const int64_t b = row / r.tokens, t = row % r.tokens;
  const T* x = static_cast<const T*>(r.x) + b * r.x_batch + t * r.x_token;
  T* y = static_cast<T*>(r.y) + row * r.heads * p.width;
  const int step = blockDim.y * gridDim.y, heads = static_cast<int>(r.heads);
  for (int h = blockIdx.y * blockDim.y + threadIdx.y; h < heads; h += Channels::unroll * step) {
    typename Channels::Part parts[Channels::unroll];
#pragma unroll
    for (int u = 0; u < Channels::unroll; ++u)
      if (h + u * step < heads) parts[u] = channels.load(x + (h + u * step) * r.x_head, r.x_channel);
#pragma unroll
    for (int u = 0; u < Channels::unroll; ++u)
      if (h + u * step < heads) channels.turn_and_store(parts[u], y + int64_t{h + u * step} * p.width);
  }
}

struct Launch {
  RopeParams params;
  int64_t blocks; // of the first rows; those behind them take the second
  bool together;  // queries and keys of a token turn alike: one thread does both
};

template <class T, template <class, bool> class Channels, bool wide>
__global__ void __launch_bounds__(THREADS, Channels<T, wide>::blocks)
    rope_cuda_kernel(const __grid_constant__ Launch launch) {
  const RopeParams& p = launch.params;
  const bool second = blockIdx.x >= launch.blocks;
  const RopeRows& r = p.rows[second];
  const int64_t row = (blockIdx.x - (second ? launch.blocks : 0)) * blockDim.z + threadIdx.z;
  if (row >= p.batch * r.tokens) return;
  const Channels<T, wide> channels(r.turns + row / r.tokens * r.turns_batch + row % r.tokens * r.turns_token,
                                   p);
  turn_heads<T>(channels, r, p, row);
  if (launch.together) turn_heads<T>(channels, p.rows[1], p, row);
}

static bool aligned(const RopeRows& r, int64_t count) {
  if (r.heads == 0 || r.tokens == 0) return true;
  const int64_t strides = r.x_batch | r.x_token | r.x_head;
  return r.x_channel == 1 && strides % count == 0 && reinterpret_cast<uintptr_t>(r.x) % 16 == 0;
}

// Whether every thread's channels are 16 bytes that can be read as one.
static bool fits(const RopeParams& p, int64_t count) {
  const bool parts = p.half ? p.turning == p.width && p.width % (2 * count) == 0 : p.width % count == 0;
  return parts && aligned(p.rows[0], count) && aligned(p.rows[1], count);
}

static bool same_turns(const RopeRows& a, const RopeRows& b) {
  return a.turns == b.turns && a.turns_batch == b.turns_batch && a.turns_token == b.turns_token &&
         a.tokens == b.tokens;
}

template <class T, template <class, bool> class Channels, bool wide>
static void launch(const RopeParams& p, cudaStream_t stream) {
  constexpr int count = Chunk<T, wide>::count;
  const int64_t channels = std::max<int64_t>(p.half ? p.turning / 2 : p.width, 1);
  const int64_t heads = std::max({p.rows[0].heads, p.rows[1].heads, int64_t{1}}); // none: no blocks
  dim3 threads(static_cast<unsigned>((channels + count - 1) / count));
  threads.y = static_cast<unsigned>(std::min<int64_t>(heads, std::max(32u / threads.x, 1u)));
  threads.z = std::min(THREADS / (threads.x * threads.y), 64u); // the most of that dimension
  const auto blocks_of = [&](const RopeRows& r) {
    return r.heads ? (p.batch * r.tokens + threads.z - 1) / threads.z : 0;
  };
  Launch launch{p, blocks_of(p.rows[0]), same_turns(p.rows[0], p.rows[1]) && p.rows[0].heads > 0};
  const int64_t blocks = launch.blocks + (launch.together ? 0 : blocks_of(p.rows[1]));
  if (blocks == 0) return;
  const int64_t shares = std::min((heads + threads.y - 1) / threads.y, (BLOCKS + blocks - 1) / blocks);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(shares));
  rope_cuda_kernel<T, Channels, wide><<<grid, threads, 0, stream>>>(launch);
}

template <class T> static void launch_type(const RopeParams& p, cudaStream_t stream) {
  const bool wide = fits(p, Chunk<T, true>::count);
  if (p.half) return wide ? launch<T, Halves, true>(p, stream) : launch<T, Halves, false>(p, stream);
  return wide ? launch<T, Neighbours, true>(p, stream) : launch<T, Neighbours, false>(p, stream);
}

void rope_cuda(const RopeParams& p, int device, void* stream) {
  const OnDevice on("rope", device);
  const auto at = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
  case DType::f32:
    launch_type<float>(p, at);
    break;
  case DType::bf16:
    launch_type<__nv_bfloat16>(p, at);
    break;
  case DType::f16:
    launch_type<__half>(p, at);
    break;
  default:
    refuse(p.dtype);
  }
  on.check(cudaGetLastError());
}

} // namespace jepa
