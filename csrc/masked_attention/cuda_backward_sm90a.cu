// The gradient of attention of sequences of at most 256 queries and keys, in one launch: one block for each
// head of keys of a sequence (dk, dv) and one for each head of queries (dq). Both compute the weights again,
// so that no sum is shared between blocks and every sum has one order.
#include "masked_attention/launch_sm90a.cuh"

namespace jepa {

struct BackwardArgs {
  TileMaps q, k, v, grad;
  AttentionShape shape;
  AttentionRows out, lse, dq, dk, dv;
  int tokens, k_tokens, sequences, room; // rows of the two axes; room: tiles of a sequence in shared memory
};

// The most warpgroups of a block: wider sums leave no registers to tell them apart.
template <int width> constexpr int WARPGROUPS = width <= 96 ? 2 : 1;

// A warpgroup takes 64 rows at a time, its own; all rows of the other side stay in shared memory. of_keys:
// keys and values are its own, queries and gradients stay; else the other way round. With a, b = k, v or q,
// grad:
//     scores = own a . a^T,  dweights = own b . b^T,  weights = exp(scale scores - lse)
//     dscores = weights (dweights - delta),  delta[i] = grad[i] . out[i]
//     d own a = scale dscores a,  d own b = weights b (of keys only)
template <class T, int width, bool of_keys> struct Backward {
  static constexpr int BYTES = Tile<width>::bytes;
  const BackwardArgs& p;
  // How many heads of queries meet here, the first of them, and their head of keys.
  const int heads, first_head, key_head;
  const Rows queries, keys;
  const float scale = p.shape.scale * LOG2_E;
  const int warpgroup = WARPGROUPS<width> == 1 ? 0 : uniform(threadIdx.x / THREADS);
  const int warpgroups = WARPGROUPS<width> == 1 ? 1 : blockDim.x / THREADS;

  // Shared memory: barriers; lse and delta of queries; each warpgroup's own tiles; the others' of a, then of
  // b.
  const Address others_here = shared_memory(), own_here = others_here + 8 + 8 * warpgroup;
  const Address lse = others_here + 1024, delta = lse + 4 * ROWS * MOST_TILES;
  const Address own_a = lse + 2048 + 2 * warpgroup * BYTES, own_b = own_a + BYTES;
  const Address others_a = lse + 2048 + 2 * warpgroups * BYTES;

  static int shared_bytes(int warpgroups, int room) { return 1024 + 2048 + 2 * (warpgroups + room) * BYTES; }

  __device__ Backward(const BackwardArgs& args, int s, int head, int group)
      : p(args), heads(of_keys ? group : 1), first_head(of_keys ? head * group : head),
        key_head(of_keys ? head : head / group),
        queries(rows_of(args.shape.cu_seqlens, args.shape.queries, s, ROWS * args.room)),
        keys(rows_of(args.shape.k_cu_seqlens, args.shape.keys, s, ROWS * args.room)) {}

  __device__ const Rows& own() const { return of_keys ? keys : queries; }
  __device__ const Rows& others() const { return of_keys ? queries : keys; }
  __device__ int tiles() const { return tiles_of(others().count); }
  __device__ bool few_keys() const { return keys.count <= ROWS; }
  __device__ Address tile_a(int i) const { return others_a + i * BYTES; }
  __device__ Address tile_b(int i) const { return tile_a(p.room + i); }

  __device__ void run() const {
    if (own().count == 0) return;
    if (threadIdx.x == 0) {
      for (int i = 0; i <= warpgroups; ++i) barrier_init(others_here + 8 * i);
      publish_barriers();
    }
    __syncthreads();
    fetch_own(warpgroup);
    if (heads == 1) bring_others(first_head, 0);
#pragma unroll 1
    for (int i = warpgroup, turn = 0; i * ROWS < own().count; i += warpgroups, ++turn) {
      float da[width / 2] = {}, db[of_keys ? width / 2 : 1] = {};
#pragma unroll 1
      for (int j = 0; j < heads; ++j) {
        if (heads > 1) bring_others(first_head + j, (turn * heads + j) & 1);
        if (j == 0) await_own(turn & 1);
        if (!of_keys) summarise(own_b, i, warpgroup, first_head);
        warpgroup_barrier(warpgroup);
        if (of_keys && few_keys()) sum_means_of_queries();
        add_products(da, db);
      }
      warpgroup_barrier(warpgroup); // nobody reads this tile
      fetch_own(i + warpgroups);
      store(i, da, db);
    }
  }

  __device__ void fetch_own(int tile) const {
    if (threadIdx.x % THREADS || tile * ROWS >= own().count) return;
    barrier_expect(own_here, 2 * BYTES);
    load_tile<width>(own_a, of_keys ? p.k : p.q, own_here, own(), tile, of_keys ? key_head : first_head);
    load_tile<width>(own_b, of_keys ? p.v : p.grad, own_here, own(), tile, of_keys ? key_head : first_head);
  }

  __device__ void await_own(int parity) const {
    barrier_wait(own_here, parity);
    if (!of_keys || !few_keys() || keys.count == ROWS) return;
    clear_rows<width>(own_a, keys.count, threadIdx.x % THREADS, THREADS);
    clear_rows<width>(own_b, keys.count, threadIdx.x % THREADS, THREADS);
    publish_shared();
  }

  // By the whole block. Where several heads take turns, that is one warpgroup.
  __device__ void bring_others(int head, int parity) const {
    __syncthreads(); // nobody reads the last head's
    if (threadIdx.x == 0) {
      barrier_expect(others_here, 2 * tiles() * BYTES);
      for (int i = 0; i < tiles(); ++i) {
        load_tile<width>(tile_a(i), of_keys ? p.q : p.k, others_here, others(), i, of_keys ? head : key_head);
        load_tile<width>(tile_b(i), of_keys ? p.grad : p.v, others_here, others(), i,
                         of_keys ? head : key_head);
      }
    }
    barrier_wait(others_here, parity);
    if (const int last = others().count % ROWS) {
      clear_rows<width>(tile_a(tiles() - 1), last, threadIdx.x, blockDim.x);
      clear_rows<width>(tile_b(tiles() - 1), last, threadIdx.x, blockDim.x);
      publish_shared();
    }
    if (of_keys)
      for (int i = warpgroup; i < tiles(); i += warpgroups) summarise(tile_b(i), i, i, head);
    __syncthreads();
  }

  // lse in units of log 2 and delta of a tile of queries, two threads a row. A query behind the last one gets
  // an infinite lse: its weights are 0.
  __device__ void summarise(Address grads, int tile, int slot, int head) const {
    const int row = threadIdx.x % THREADS / 2, at = 4 * (slot * ROWS + row);
    const bool there = tile * ROWS + row < queries.count;
    float sum = 0;
    if (there) {
      const uint16_t* out = row_of(p.out, queries, tile * ROWS + row, head);
      for (int channel = threadIdx.x % 2 * 8; channel < width; channel += 16) {
        const Words g = load_shared(grads + Tile<width>::at(row, channel)), o = load_global(out + channel);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = unpack<T>(g.at[i]), y = unpack<T>(o.at[i]);
          sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
        }
      }
    }
    sum += exchange(sum, 1);
    if (threadIdx.x % 2) return;
    store_shared(delta + at, sum);
    store_shared(lse + at, there ? *lse_of(p.lse, queries, tile * ROWS + row, head) * LOG2_E : INFINITY);
  }

  // The products with each tile run beside the sums over the tile before it.
  __device__ void add_products(float (&da)[width / 2], float (&db)[of_keys ? width / 2 : 1]) const {
    float scores[32], dweights[32];
    uint32_t weights[16], dscores[16];
#pragma unroll 1
    for (int i = 0; i < tiles(); ++i) {
      multiply_pair(scores, dweights, own_a, tile_a(i), own_b, tile_b(i));
      if (!of_keys && i + 1 == tiles()) hide_after(scores, keys.count - i * ROWS);
      differentiate(i, scores, dweights, weights, dscores);
      products_begin();
      if constexpr (of_keys) add_rows<T, width>(db, weights, tile_b(i));
      add_rows<T, width>(da, dscores, tile_a(i));
      products_commit();
    }
    products_wait<0>();
    pin(da);
    pin(db);
  }

  // Queries are columns here in the pass of keys, rows in that of queries.
  __device__ void differentiate(int tile, float (&scores)[32], const float (&dweights)[32],
                                uint32_t (&weights)[16], uint32_t (&dscores)[16]) const {
    const int column = tile * ROWS + fragment_column(), row = warpgroup * ROWS + fragment_row();
    float2 means[2];
#pragma unroll
    for (int half = 0; half < 2 && !of_keys; ++half) means[half] = statistics(delta, row + 8 * half);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float2 l = statistics(lse, of_keys ? column + i / 2 * 8 : row + i % 2 * 8);
      scores[2 * i] = fast_exp2(fmaf(scores[2 * i], scale, -l.x));
      scores[2 * i + 1] = fast_exp2(fmaf(scores[2 * i + 1], scale, -l.y));
    }
    if (!of_keys && few_keys()) sum_means(scores, dweights, means);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float2 mean = of_keys ? statistics(delta, column + i / 2 * 8) : means[i % 2];
      weights[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
      dscores[i] = pack<T>(scores[2 * i] * (dweights[2 * i] - mean.x),
                           scores[2 * i + 1] * (dweights[2 * i + 1] - mean.y));
    }
  }
  __device__ static float2 statistics(Address of, int query) {
    if (of_keys) return load_shared_pair(of + 4 * query);
    const float x = load_shared_float(of + 4 * query);
    return {x, x};
  }
  // delta as the mean of d weights, where one tile holds all keys. Among few keys the rounding of `out`
  // shows.
  __device__ static void sum_means(const float (&weights)[32], const float (&dweights)[32],
                                   float2 (&means)[2]) {
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

  // The same in the pass of keys, from products whose rows are queries.
  __device__ void sum_means_of_queries() const {
#pragma unroll 1
    for (int i = 0; i < tiles(); ++i) {
      float scores[32], dweights[32];
      float2 means[2];
      const int row = i * ROWS + fragment_row();
      const float l[2] = {load_shared_float(lse + 4 * row), load_shared_float(lse + 4 * (row + 8))};
      multiply_pair(scores, dweights, tile_a(i), own_a, tile_b(i), own_b);
      hide_after(scores, keys.count);
#pragma unroll
      for (int j = 0; j < 32; ++j) scores[j] = fast_exp2(fmaf(scores[j], scale, -l[j / 2 % 2]));
      sum_means(scores, dweights, means);
      if (threadIdx.x % 4) continue;
      store_shared(delta + 4 * row, means[0].x);
      store_shared(delta + 4 * (row + 8), means[1].x);
    }
    warpgroup_barrier(warpgroup);
  }

  __device__ static void multiply_pair(float (&scores)[32], float (&dweights)[32], Address a, Address a_other,
                                       Address b, Address b_other) {
    products_begin();
    multiply_tiles<T, width>(scores, a, a_other);
    multiply_tiles<T, width>(dweights, b, b_other);
    products_commit();
    products_wait<0>();
    pin(scores);
    pin(dweights);
  }

  __device__ void store(int tile, const float (&da)[width / 2],
                        const float (&db)[of_keys ? width / 2 : 1]) const {
    const int first = tile * ROWS, count = own().count - first, h = of_keys ? key_head : first_head;
    const AttentionRows& to = of_keys ? p.dk : p.dq;
    store_tile<T, width>(da, {p.shape.scale, p.shape.scale}, row_of(to, own(), first, h), to.row, count);
    if constexpr (of_keys) store_tile<T, width>(db, {1, 1}, row_of(p.dv, own(), first, h), p.dv.row, count);
  }
};

// Rows of a packed axis behind its last sequence.
template <int width> __device__ void clear_unused(const BackwardArgs& p, bool of_keys, int head) {
  const int32_t* starts = of_keys ? p.shape.k_cu_seqlens : p.shape.cu_seqlens;
  const Rows rows = {0, starts[p.sequences], 0};
  clear_output<width>(of_keys ? p.dk : p.dq, rows, of_keys ? p.k_tokens : p.tokens, head);
  if (of_keys) clear_output<width>(p.dv, rows, p.k_tokens, head);
}

template <class T, int width>
__global__ void __launch_bounds__(WARPGROUPS<width>* THREADS, 1)
    masked_attention_backward_cuda_kernel(const __grid_constant__ BackwardArgs p) {
  const int heads = static_cast<int>(p.shape.heads), key_heads = static_cast<int>(p.shape.key_heads);
  const int blocks = heads + key_heads;
  const int s = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const bool of_keys = block < key_heads;
  const int head = of_keys ? block : block - key_heads;
  if (s == p.sequences)
    clear_unused<width>(p, of_keys, head);
  else if (of_keys)
    Backward<T, width, true>(p, s, head, heads / key_heads).run();
  else
    Backward<T, width, false>(p, s, head, heads / key_heads).run();
}

template <class T, int width> static void backward(const MaskedAttentionCudaParams& p) {
  const AttentionShape& shape = p.shape;
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
  // Two warpgroups share the others' tiles where no second block fits, and where no heads take turns.
  const auto bytes = &Backward<T, width, true>::shared_bytes;
  const bool two = args.room > 1 && shape.heads == shape.key_heads && bytes(1, args.room) > HALF;
  const int warpgroups = two ? WARPGROUPS<width> : 1;
  const int64_t sequences = p.sequences + (shape.cu_seqlens ? 1 : 0);
  launch(OP, masked_attention_backward_cuda_kernel<T, width>,
         {sequences * (shape.heads + shape.key_heads), warpgroups * THREADS, bytes(warpgroups, args.room),
          p.device, p.stream},
         args);
}

void masked_attention_backward_cuda(const MaskedAttentionCudaParams& p) {
  for_kernel(p.shape, [&](auto type, auto width) { backward<decltype(type), decltype(width)::value>(p); });
}

} // namespace jepa
