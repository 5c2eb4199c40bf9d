// Rotary position embedding: channels turn in pairs, by a table of cosines and signed sines of each token.
#pragma once
#include <cstdint>

#include "../common/dispatch.h"
#include "../common/dtype.h"

namespace jepa {

// Queries or keys. Strides in elements.
struct RopeRows {
  const void* x; // [batch, tokens, heads, width]
  int64_t x_batch, x_token, x_head, x_channel;
  void* y;            // the same, contiguous
  const float* turns; // [batch, tokens, 2, turning]: cosines and sines; the last two contiguous
  int64_t turns_batch, turns_token;
  int64_t tokens, heads;
};

struct RopeParams {
  RopeRows rows[2]; // the second without heads where there is one tensor
  int64_t batch, width, turning;
  bool half; // channel i pairs with i + turning / 2, not with its neighbour
  bool back; // the transpose: the gradient's way
  DType dtype;
  int threads;
};

JEPA_DECLARE_CPU(rope_cpu, RopeParams)

// On the GPU; turns must begin at multiples of 8 bytes. Throws std::runtime_error where the launch fails.
void rope_cuda(const RopeParams&, int device, void* stream);

enum class RopePairing { interleaved, tiled, half };

// The table: out[b, t] = cosines, then signed sines, of positions[b, t, axis] * frequencies.
struct RopeTurnsParams {
  const float* positions; // [batch, tokens, axes]
  int64_t stride_batch, stride_token, stride_axis;
  const float* frequencies; // [pairs]
  float* out;               // [batch, tokens, 2, axes * 2 * pairs]
  int64_t batch, tokens, axes, pairs;
  RopePairing pairing;
  int threads;
};

JEPA_DECLARE_CPU(rope_turns_cpu, RopeTurnsParams)

} // namespace jepa
