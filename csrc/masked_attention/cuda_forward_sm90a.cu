// Attention of sequences of at most 256 queries and keys: one launch for all. As many blocks as the machine
// holds at once take the heads in turns.
#include "masked_attention/forward_sm90a.cuh"

namespace jepa {

// What is written where there are no keys, and behind the last sequence of a packed axis.
template <int width>
__device__ void clear(const ForwardArgs& p, const Head& begin, int count, const Rows& rows) {
  Head head = begin;
  const Head step(p.groups, p.heads);
  for (int n = 0; n < count; ++n, head.advance(step, p.heads)) {
    const Rows own = {head.plane, rows.first, rows.count};
    clear_output<width>(p.out, own, own.first + own.count, head.at);
    for (int i = threadIdx.x; i < own.count; i += blockDim.x) *lse_of(p.lse, own, i, head.at) = -INFINITY;
  }
}

// Warpgroups that a multiprocessor has registers for: some compute while others wait.
constexpr int warpgroups_of(int width) { return width <= 40 ? 5 : width <= 96 ? 4 : 3; }

template <class T, int width>
__global__ void __launch_bounds__(2 * THREADS, warpgroups_of(width) / 2)
    masked_attention_forward_cuda_kernel(const __grid_constant__ ForwardArgs p) {
  const int s = blockIdx.x / p.groups, first = blockIdx.x % p.groups;
  const Head begin(first, p.heads);
  const int count = (p.all - first + p.groups - 1) / p.groups;
  if (s == p.sequences) {
    const int used = p.shape.cu_seqlens[s];
    return clear<width>(p, begin, count, {0, used, p.tokens - used});
  }
  const Forward<T, width> forward(p, s, begin, count);
  if (forward.tiles == 0) return clear<width>(p, begin, count, forward.queries);
  forward.run();
}

// Of a block's shared memory: as many warpgroups at once as there is room for, then queries fetched early.
struct Layout {
  int warpgroups, query_tiles, bytes, resident; // resident: blocks on a multiprocessor
};

template <int width> Layout layout_of(const AttentionShape& shape, int key_tiles) {
  Layout best{};
  for (int warpgroups = shape.most_queries <= ROWS ? 1 : 2; warpgroups > 0; --warpgroups)
    for (int query_tiles = 2; query_tiles > 0; --query_tiles) {
      const int bytes = 1024 + (warpgroups * query_tiles + 2 * key_tiles) * Tile<width>::bytes;
      const int room = MULTIPROCESSOR_BYTES / (bytes + 1024), most = warpgroups_of(width) / warpgroups;
      const int resident = room < most ? room : most;
      if (bytes <= BLOCK_BYTES && resident * warpgroups > best.resident * best.warpgroups)
        best = {warpgroups, query_tiles, bytes, resident};
    }
  return best;
}

// Blocks of a sequence, which take its heads in turns. One sequence, or all of one length: as many as are
// there at once. Others, whose work differs: four blocks for each place.
inline int groups_of(int64_t heads, int64_t sequences, int64_t places) {
  const int64_t groups = sequences > 1 ? 4 * places / sequences : places;
  return static_cast<int>(groups < 1 ? 1 : groups < heads ? groups : heads);
}

template <class T, int width> static void forward(const MaskedAttentionCudaParams& p) {
  const AttentionShape& shape = p.shape;
  const bool packed = shape.cu_seqlens;
  const int64_t all = packed ? shape.heads : p.sequences * shape.heads;
  if (all == 0) return;
  const OnDevice on(OP, p.device); // a thread of autograd may have no context yet, and tensor maps need one
  ForwardArgs args{};
  args.q = maps_of<width>(p.q, shape.heads);
  args.k = maps_of<width>(p.k, shape.key_heads);
  args.v = maps_of<width>(p.v, shape.key_heads);
  args.shape = shape;
  args.out = p.out;
  args.lse = p.lse;
  args.tokens = static_cast<int>(p.q.count);
  args.sequences = static_cast<int>(packed ? p.sequences : 1);
  args.heads = static_cast<int>(shape.heads);
  args.all = static_cast<int>(all);
  args.group = static_cast<int>(shape.heads / shape.key_heads);
  args.key_tiles = room_for(shape.most_keys);
  const Layout layout = layout_of<width>(shape, args.key_tiles);
  args.query_tiles = layout.query_tiles;
  args.groups = groups_of(all, args.sequences, layout.resident * multiprocessors(OP, p.device));
  launch(OP, masked_attention_forward_cuda_kernel<T, width>,
         {int64_t(args.sequences + packed) * args.groups, layout.warpgroups * THREADS, layout.bytes, p.device,
          p.stream},
         args);
}

void masked_attention_forward_cuda(const MaskedAttentionCudaParams& p) {
  for_kernel(p.shape, [&](auto type, auto width) { forward<decltype(type), decltype(width)::value>(p); });
}

} // namespace jepa
