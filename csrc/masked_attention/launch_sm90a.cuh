// From a call's tensors to the arguments of a kernel.
#pragma once
#include "common/hopper_host.cuh"
#include "masked_attention/tile_sm90a.cuh"

namespace jepa {

constexpr const char* OP = "masked_attention";
constexpr int MOST_TILES = 4; // of a sequence: 256 queries, 256 keys
constexpr int MULTIPROCESSOR_BYTES = 228 * 1024, BLOCK_BYTES = 227 * 1024; // of shared memory
constexpr int HALF =
    (228 / 2 - 1) * 1024; // bytes: of two blocks on a multiprocessor, which keeps 1 KB for each

// An empty tensor has no maps, and nobody fetches from it. Strides of dimensions of size 1 are of no use, but
// must be valid: a row's length is.
template <int width> TileMaps maps_of(const AttentionInput& x, int64_t heads) {
  const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
  const auto bytes = [&](int64_t stride, int64_t n) { return size(2 * (n == 1 ? width : stride)); };
  TileMaps maps{};
  if (x.sequences * x.count * heads == 0) return maps;
  for (int piece = 0; piece < Tile<width>::pieces; ++piece)
    maps.pieces[piece] = tensor_map(
        OP, {x.at.data,
             {width, size(x.count), size(heads), size(x.sequences)},
             {bytes(x.at.row, x.count), bytes(x.at.head, heads), bytes(x.at.sequence, x.sequences)},
             Tile<width>::line(piece),
             ROWS});
  return maps;
}

inline int room_for(int64_t rows) {
  return static_cast<int>(rows < 1 ? 1 : rows > ROWS * MOST_TILES ? MOST_TILES : (rows + ROWS - 1) / ROWS);
}

// Calls run(type, width) with the width, 8 to 128, as a constant.
template <class T, int width = 8, class Run> void for_width(int64_t channels, const Run& run) {
  if (channels == width) return run(T{}, std::integral_constant<int, width>{});
  if constexpr (width < 128) for_width<T, width + 8>(channels, run);
}

template <class Run> void for_kernel(const AttentionShape& shape, const Run& run) {
  if (shape.dtype == DType::bf16) return for_width<bf16>(shape.width, run);
  if (shape.dtype == DType::f16) return for_width<f16>(shape.width, run);
  refuse(shape.dtype);
}

} // namespace jepa
