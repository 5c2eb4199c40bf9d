// The gradient of attention of sequences of at most 256 queries and keys, in one launch. Short sequences: one
// block a head, which keeps d scores in shared memory for dq. Else one block for each head of keys of a
// sequence (dk, dv) and one for each head of queries (dq), which compute the weights again. No sum is shared
// between blocks, and every sum has one order.
#include "masked_attention/backward_sm90a.cuh"

namespace jepa {

// Rows of a packed axis behind its last sequence.
template <int width> __device__ void clear_unused(const BackwardArgs& p, bool of_keys, int head) {
  const int32_t* starts = of_keys ? p.shape.k_cu_seqlens : p.shape.cu_seqlens;
  const Rows rows = {0, starts[p.sequences], 0};
  clear_output<width>(of_keys ? p.dk : p.dq, rows, of_keys ? p.k_tokens : p.tokens, head);
  if (of_keys) clear_output<width>(p.dv, rows, p.k_tokens, head);
}

// Wider sums leave no room for two blocks a multiprocessor.
template <int width> constexpr bool CAN_TAKE_BOTH = width <= 80;

// By the sequence alone, so that its bits do not depend on those beside it.
__device__ inline bool is_short(int rows) { return rows > 0 && rows <= 2 * ROWS; }

template <class T, int width> __device__ void run_pass(const BackwardArgs& p, int s, int head, bool of_keys) {
  const int heads = static_cast<int>(p.shape.heads), key_heads = static_cast<int>(p.shape.key_heads);
  if (s == p.sequences) return clear_unused<width>(p, of_keys, head);
  if constexpr (CAN_TAKE_BOTH<width>) {
    const Backward<T, width, Pass::both> whole(p, s, head, 1);
    if (p.both && is_short(whole.queries.count) && is_short(whole.keys.count)) {
      if (of_keys) whole.run();
      return;
    }
  }
  if (of_keys)
    Backward<T, width, Pass::keys>(p, s, head, heads / key_heads).run();
  else
    Backward<T, width, Pass::queries>(p, s, head, heads / key_heads).run();
}

template <class T, int width>
__global__ void __launch_bounds__(WARPGROUPS<width>* THREADS, width <= 32 ? 3 : 1)
    masked_attention_backward_cuda_kernel(const __grid_constant__ BackwardArgs p) {
  const int heads = static_cast<int>(p.shape.heads), key_heads = static_cast<int>(p.shape.key_heads);
  const int s = blockIdx.x / p.blocks;
#pragma unroll 1
  for (int head = blockIdx.x % p.blocks; head < key_heads + heads; head += p.blocks) {
    run_pass<T, width>(p, s, head < key_heads ? head : head - key_heads, head < key_heads);
    if (!CAN_TAKE_BOTH<width>) break;
  }
}

template <class T, int width> static void backward(const MaskedAttentionCudaParams& p) {
  const AttentionShape& shape = p.shape;
  const OnDevice on(OP, p.device); // a thread of autograd may have no context yet, and tensor maps need one
  BackwardArgs args{};
  args.q = maps_of<width>(p.q, shape.heads);
  args.k = maps_of<width>(p.k, shape.key_heads);
  args.v = maps_of<width>(p.v, shape.key_heads);
  args.grad = maps_of<width>(p.grad, shape.heads);
  args.shape = shape;
  args.out = p.out;
  args.lse = p.lse;
  args.dq = p.dq;
  args.dk = p.dk;
  args.dv = p.dv;
  args.tokens = static_cast<int>(p.q.count);
  args.k_tokens = static_cast<int>(p.k.count);
  args.sequences = static_cast<int>(p.sequences);
  args.room = room_for(shape.most_queries > shape.most_keys ? shape.most_queries : shape.most_keys);
  args.both = CAN_TAKE_BOTH<width> && shape.heads == shape.key_heads;
  const bool all_short = args.both && args.room <= 2;
  args.blocks = static_cast<int>(all_short ? shape.heads : shape.heads + shape.key_heads);
  // Two warpgroups share the others' tiles where no second block fits, and where no heads take turns.
  using Keys = Backward<T, width, Pass::keys>;
  const bool two = args.room > 1 && shape.heads == shape.key_heads && Keys::shared_bytes(1, args.room) > HALF;
  const int warpgroups = two ? WARPGROUPS<width> : 1, apart = Keys::shared_bytes(warpgroups, args.room);
  const int whole = args.both ? Keys::shared_bytes_of_both(args.room) : 0;
  const int64_t sequences = p.sequences + (shape.cu_seqlens ? 1 : 0);
  launch(OP, masked_attention_backward_cuda_kernel<T, width>,
         {sequences * args.blocks, warpgroups * THREADS, apart > whole ? apart : whole, p.device, p.stream},
         args);
}

void masked_attention_backward_cuda(const MaskedAttentionCudaParams& p) {
  for_kernel(p.shape, [&](auto type, auto width) { backward<decltype(type), decltype(width)::value>(p); });
}

} // namespace jepa
