// A block adds the squares of a chunk; one block then adds what they found, in an order that depends on the
// sizes alone. In double, where squares are exact and none overflows: a GPU with its full share of such units
// converts 16 numbers a cycle and multiprocessor, and memory brings it 10 at most.
#include "grad_norm/grad_norm.h"

#include "common/chunks.cuh"

namespace jepa {

constexpr int UNROLL = 4, SUM_THREADS = 1024;

template <class T> struct Squares {
  static constexpr int width = 16 / sizeof(T);
  const T* grad;
  double sums[width] = {};

  template <int n> __device__ Pack<T, n> load(int i) const { return load_pack<n, true>(grad + i); }
  template <int n> __device__ void finish(const Pack<T, n>& x, int) {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const double y = widen(x.at[k]);
      sums[k] += y * y;
    }
  }
};

// The sum over all threads, for thread 0.
template <int threads> __device__ double total(double own) {
  __shared__ double sums[threads];
  sums[threadIdx.x] = own;
  for (int half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

template <class T>
__global__ void __launch_bounds__(CHUNK_THREADS)
    grad_norm_forward_cuda_kernel(const __grid_constant__ GradNormCudaParams p) {
  const GradNormChunk c = p.chunks[blockIdx.x];
  Squares<T> squares{static_cast<const T*>(c.grad)};
  go_through<Squares<T>::width, UNROLL>(squares, static_cast<int>(c.numel), aligned(c.grad));
  double own = 0;
#pragma unroll
  for (const double sum : squares.sums) own += sum;
  const double all = total<CHUNK_THREADS>(own);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = all;
}

static __global__ void __launch_bounds__(SUM_THREADS)
    grad_norm_sum_cuda_kernel(const __grid_constant__ GradNormSumCudaParams p) {
  double own = 0;
  for (int64_t i = threadIdx.x; i < p.count; i += SUM_THREADS) own += p.partial[i];
  const double all = total<SUM_THREADS>(own);
  if (threadIdx.x == 0) *p.norm = static_cast<float>(sqrt(all));
}

template <class T> static void launch_type(const GradNormCudaParams& p) {
  launch("grad_norm", grad_norm_forward_cuda_kernel<T>, {p.count, CHUNK_THREADS, 0, p.device, p.stream}, p);
}

void grad_norm_cuda(const GradNormCudaParams& p) {
  switch (p.dtype) {
  case DType::f32:
    return launch_type<float>(p);
  case DType::bf16:
    return launch_type<__nv_bfloat16>(p);
  case DType::f16:
    return launch_type<__half>(p);
  default:
    refuse(p.dtype);
  }
}

void grad_norm_sum_cuda(const GradNormSumCudaParams& p) {
  launch("grad_norm", grad_norm_sum_cuda_kernel, {1, SUM_THREADS, 0, p.device, p.stream}, p);
}

} // namespace jepa
