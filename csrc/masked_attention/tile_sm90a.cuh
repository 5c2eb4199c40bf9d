// Tiles of 64 rows in shared memory, as bulk copies write them and matrix products read them.
#pragma once
#include "common/hopper.cuh"
#include "masked_attention/masked_attention.h"

namespace jepa {

constexpr float LOG2_E = 1.44269504f;
constexpr int ROWS = 64;     // of a tile: of a matrix product, and of the box that one bulk copy fetches
constexpr int THREADS = 128; // of a warpgroup, which issues matrix products together

// 64 rows of `width` channels in pieces of at most 64, so that a row of a piece is one line of a swizzle
// pattern: 128, 64 or 32 bytes. 80 channels are 64 + 16; what rounding a line up costs is shared memory only.
template <int width> struct Tile {
  static constexpr int pieces = (width + 63) / 64;
  static constexpr int steps = (width + 15) / 16; // of a product over the channels

  static constexpr int channels(int piece) { return width - 64 * piece < 64 ? width - 64 * piece : 64; }
  static constexpr int line(int piece) { return channels(piece) > 32 ? 128 : channels(piece) > 16 ? 64 : 32; }
  static constexpr int start(int piece) { return piece * ROWS * 128; }
  static constexpr int bytes = start(pieces - 1) + ROWS * line(pieces - 1);
  static_assert(width % 8 == 0 && width <= 128 && bytes % 1024 == 0);

  // The byte of an element. "Swizzling modes": the 16-byte words of a line are permuted by the number of the
  // 128-byte line they lie in.
  static __device__ int at(int row, int channel) {
    const int piece = channel / 64, byte = row * line(piece) + channel % 64 * 2;
    return start(piece) + (byte ^ (byte >> 3 & (line(piece) - 16)));
  }

  // "Matrix descriptor": address, leading offset, stride offset in 16-byte units; swizzle 1, 2, 3 for lines
  // of 128, 64, 32 bytes. The stride goes from 8 rows to the next 8, in K-major and in MN-major operands
  // alike; the leading offset is not used where a line holds all of an operand's columns.
  // An address of shared memory has no more bits than the descriptor takes.
  static __device__ uint64_t descriptor(Address tile, int offset, int line) {
    const uint64_t mode = line == 128 ? 1 : line == 64 ? 2 : 3;
    const uint32_t low = (tile >> 4) + (offset >> 4 | 1 << 16);
    return low | (uint64_t(8 * line >> 4) << 32 | mode << 62);
  }

  // All rows, channels [16 step, 16 step + 16): K-major.
  static __device__ uint64_t by_channel(Address tile, int step) {
    return descriptor(tile, start(step / 4) + step % 4 * 32, line(step / 4));
  }
  // Rows [16 step, 16 step + 16), all channels of a piece: MN-major.
  static __device__ uint64_t by_row(Address tile, int piece, int step) {
    return descriptor(tile, start(piece) + step * 16 * line(piece), line(piece));
  }
};

// A tensor [sequences, heads, rows, channels] of any strides, piece by piece.
struct TileMaps {
  TensorMap pieces[2];
};

// Rows [first, first + count) of one sequence. On a packed axis the plane is 0 and rows count from the first
// of all.
struct Rows {
  int plane, first, count;
};

// Sequence s of an axis: `rows` rows of each where cu_seqlens is null. Never more than `most`, whatever
// cu_seqlens says.
__device__ inline Rows rows_of(const int32_t* cu_seqlens, int rows, int s, int most) {
  if (!cu_seqlens) return {s, 0, rows};
  const int first = cu_seqlens[s], count = cu_seqlens[s + 1] - first;
  return {0, first, count < 0 ? 0 : count < most ? count : most};
}

__device__ inline int tiles_of(int rows) { return (rows + ROWS - 1) / ROWS; }

template <int width>
__device__ void load_tile(Address to, const TileMaps& from, Address barrier, const Rows& rows, int tile,
                          int head) {
#pragma unroll
  for (int piece = 0; piece < Tile<width>::pieces; ++piece)
    load_box(to + Tile<width>::start(piece), from.pieces[piece], barrier, 64 * piece,
             rows.first + tile * ROWS, head, rows.plane);
}

// The rows behind a sequence's last belong to another, and may be NaN: 0 * NaN would reach the sum over rows.
template <int width, int last = ROWS>
__device__ void clear_rows(Address tile, int first, int thread, int threads) {
  for (int i = thread; i < (last - first) * (width / 8); i += threads)
    store_shared(tile + Tile<width>::at(first + i / (width / 8), i % (width / 8) * 8), Words{});
}

// Which rows of a product [64, n] a thread holds: row() and row() + 8; of each 8 columns it holds two, from
// column(). "Register fragments", wgmma accumulator D.
__device__ inline int fragment_row() { return threadIdx.x % THREADS / 32 * 16 + threadIdx.x % 32 / 4; }
__device__ inline int fragment_column() { return threadIdx.x % 4 * 2; }

// scores = a b^T over the channels of two tiles, of the first `columns` rows of b.
template <class T, int width, int columns = ROWS>
__device__ void multiply_tiles(float (&scores)[columns / 2], Address a, Address b) {
#pragma unroll
  for (int step = 0; step < Tile<width>::steps; ++step)
    multiply_shared<T, columns>(scores, Tile<width>::by_channel(a, step), Tile<width>::by_channel(b, step),
                                step > 0);
}

// No weight for columns from `count` on.
template <int n> __device__ inline void hide_after(float (&scores)[n], int count) {
  if (count >= 2 * n) return;
  const int left = count - fragment_column();
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (i / 4 * 8 + i % 2 >= left) scores[i] = -INFINITY;
}

// sum [64, width] += weights [64, 4 n] tile: the weights as pairs, in the order of the accumulator they were
// made from, which is that of operand A.
template <class T, int width, int piece = 0, int n = ROWS / 4>
__device__ void add_rows(float (&sum)[width / 2], const uint32_t (&weights)[n], Address tile) {
#pragma unroll
  for (int step = 0; step < n / 4; ++step)
    multiply_registers<T, Tile<width>::channels(piece)>(sum + 32 * piece, weights + 4 * step,
                                                        Tile<width>::by_row(tile, piece, step));
  if constexpr (piece + 1 < Tile<width>::pieces) add_rows<T, width, piece + 1>(sum, weights, tile);
}

// sum [64, width] += weights^T tile: both in shared memory, weights as a tile of 64 rows and columns.
template <class T, int width, int piece = 0>
__device__ void add_columns(float (&sum)[width / 2], Address weights, Address tile) {
#pragma unroll
  for (int step = 0; step < ROWS / 16; ++step)
    multiply_columns<T, Tile<width>::channels(piece)>(sum + 32 * piece, Tile<ROWS>::by_row(weights, 0, step),
                                                      Tile<width>::by_row(tile, piece, step));
  if constexpr (piece + 1 < Tile<width>::pieces) add_columns<T, width, piece + 1>(sum, weights, tile);
}

// Four neighbouring threads hold 4 bytes each of four 16-byte words: afterwards thread t holds word t.
__device__ inline void transpose_quad(Words& w) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const bool upper = threadIdx.x & bit;
      const uint32_t got = exchange(upper ? w.at[i] : w.at[i | bit], bit);
      if (upper)
        w.at[i] = got;
      else
        w.at[i | bit] = got;
    }
}

// Rounds rows * factors and writes the first `count` of them, 16 bytes a store.
template <class T, int width>
__device__ void store_tile(const float (&rows)[width / 2], const float (&factors)[2], uint16_t* to,
                           int64_t stride, int count) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = fragment_row() + 8 * half;
#pragma unroll
    for (int block = 0; block < width; block += 32) {
      Words w{};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (block + 8 * i < width) {
          const float* pair = rows + (block / 8 + i) * 4 + half * 2;
          w.at[i] = pack<T>(pair[0] * factors[half], pair[1] * factors[half]);
        }
      transpose_quad(w);
      const int channel = block + threadIdx.x % 4 * 8;
      if (row < count && channel < width) store_global(to + row * stride + channel, w);
    }
  }
}

__device__ inline uint16_t* row_of(const AttentionRows& x, const Rows& rows, int row, int head) {
  return static_cast<uint16_t*>(x.data) + rows.plane * x.sequence + (rows.first + row) * x.row +
         head * x.head;
}

__device__ inline float* lse_of(const AttentionRows& x, const Rows& rows, int row, int head) {
  return static_cast<float*>(x.data) + rows.plane * x.sequence + rows.first + row + head * x.head;
}

// Zeros in rows [rows.first, last) of one head.
template <int width>
__device__ void clear_output(const AttentionRows& x, const Rows& rows, int last, int head) {
  const int words = width / 8, count = (last - rows.first) * words;
  for (int i = threadIdx.x; i < count; i += blockDim.x)
    store_global(row_of(x, rows, i / words, head) + i % words * 8, Words{});
}

} // namespace jepa
