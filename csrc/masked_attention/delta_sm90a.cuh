// delta of a query, by which the gradient of softmax is shifted: grad . out, which is also the mean of d
// weights by the weights.
#pragma once
#include "masked_attention/tile_sm90a.cuh"

namespace jepa {

// What a thread takes from device memory for a row of queries, two threads a row.
template <int width> struct Outputs {
  Words out[(width + 15) / 16] = {};
  float lse = 0;

  Outputs() = default;
  __device__ Outputs(const uint16_t* row, float lse) : lse(lse) {
#pragma unroll
    for (int i = 0; i < (width + 15) / 16; ++i)
      if (const int channel = threadIdx.x % 2 * 8 + 16 * i; channel < width)
        out[i] = load_global(row + channel);
  }
};

// grad . out of the thread's row, in both of its threads; 0 where there is none.
template <class T, int width> __device__ float delta_of(const Outputs<width>& x, Address grads, bool there) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < (width + 15) / 16; ++i) {
    const int channel = threadIdx.x % 2 * 8 + 16 * i;
    if (!there || channel >= width) continue;
    const Words grad = load_shared(grads + Tile<width>::at(threadIdx.x % THREADS / 2, channel));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 left = unpack<T>(grad.at[j]), right = unpack<T>(x.out[i].at[j]);
      sum = fmaf(left.x, right.x, fmaf(left.y, right.y, sum));
    }
  }
  return sum + exchange(sum, 1);
}

// The mean of d weights of each of a thread's two rows, where one tile holds all keys: among few keys the
// rounding of `out` shows.
__device__ inline void means_of(const float (&weights)[32], const float (&dweights)[32], float2 (&means)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if (i / 2 % 2 == half) sum = fmaf(weights[i], dweights[i], sum);
    sum += exchange(sum, 1);
    sum += exchange(sum, 2);
    means[half] = {sum, sum};
  }
}

} // namespace jepa
