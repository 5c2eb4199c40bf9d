// Attention of sequences of at most 256 queries and keys. A block takes one head of one sequence: its keys
// and values come to shared memory once; each warpgroup takes 64 queries at a time.
#include "masked_attention/launch_sm90a.cuh"

namespace jepa {

struct ForwardArgs {
  TileMaps q, k, v;
  AttentionShape shape;
  AttentionRows out, lse;
  int tokens, sequences, key_tiles; // tokens: rows of the queries' axis; key_tiles: room for keys
};

template <class T, int width> struct Forward {
  static constexpr int BYTES = Tile<width>::bytes;
  const ForwardArgs& p;
  const int head, key_head, warpgroup = uniform(threadIdx.x / THREADS), warpgroups = blockDim.x / THREADS;
  const Rows queries, keys;
  const int tiles = tiles_of(keys.count);
  const float scale = p.shape.scale * LOG2_E;

  // Shared memory: barriers, a tile of queries for each warpgroup, keys, values.
  const Address barriers = shared_memory();

  __device__ Forward(const ForwardArgs& args, int s, int head)
      : p(args), head(head), key_head(head / int(args.shape.heads / args.shape.key_heads)),
        queries(rows_of(args.shape.cu_seqlens, args.shape.queries, s, ROWS * MOST_TILES)),
        keys(rows_of(args.shape.k_cu_seqlens, args.shape.keys, s, ROWS * args.key_tiles)) {}

  __device__ Address query_tile(int w) const { return barriers + 1024 + w * BYTES; }
  __device__ Address key_tile(int i) const { return query_tile(warpgroups) + i * BYTES; }
  __device__ Address value_tile(int i) const { return key_tile(p.key_tiles + i); }
  __device__ Address keys_here(int i) const { return barriers + 8 * i; }
  __device__ Address values_here(int i) const { return barriers + 8 * (MOST_TILES + i); }
  __device__ Address queries_here(int w) const { return barriers + 8 * (2 * MOST_TILES + w); }

  __device__ void fetch(Address to, const TileMaps& from, Address barrier, const Rows& rows, int tile,
                        int h) const {
    barrier_expect(barrier, BYTES);
    load_tile<width>(to, from, barrier, rows, tile, h);
  }

  __device__ void run() const {
    if (queries.count == 0) return;
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2 * MOST_TILES + warpgroups; ++i) barrier_init(barriers + 8 * i);
      publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x == 0) fetch_all();
    if (keys.count % ROWS) {
      barrier_wait(values_here(tiles - 1), 0);
      clear_rows<width>(value_tile(tiles - 1), keys.count % ROWS, threadIdx.x, blockDim.x);
      publish_shared();
      __syncthreads();
    }
    for (int i = warpgroup, parity = 0; i * ROWS < queries.count; i += warpgroups, parity ^= 1)
      attend(i, parity);
  }

  __device__ void fetch_all() const {
    for (int w = 0; w < warpgroups && w * ROWS < queries.count; ++w)
      fetch(query_tile(w), p.q, queries_here(w), queries, w, head);
    for (int i = 0; i < tiles; ++i) {
      fetch(key_tile(i), p.k, keys_here(i), keys, i, key_head);
      fetch(value_tile(i), p.v, values_here(i), keys, i, key_head);
    }
  }

  // The queries of the warpgroup's next tile, as soon as nobody reads those of this one.
  __device__ void fetch_next(int tile) const {
    if ((tile + warpgroups) * ROWS >= queries.count) return;
    warpgroup_barrier(warpgroup);
    if (threadIdx.x % THREADS == 0)
      fetch(query_tile(warpgroup), p.q, queries_here(warpgroup), queries, tile + warpgroups, head);
  }

  // The product with each keys runs beside that of the weights and values before them.
  __device__ void attend(int tile, int parity) const {
    float scores[32], sums[width / 2] = {}, most[2] = {-INFINITY, -INFINITY}, total[2] = {};
    uint32_t weights[16];
    barrier_wait(queries_here(warpgroup), parity);
    for (int i = 0; i < tiles; ++i) {
      barrier_wait(keys_here(i), 0);
      products_begin();
      multiply_tiles<T, width>(scores, query_tile(warpgroup), key_tile(i));
      products_commit();
      products_wait<0>();
      pin(scores);
      pin(sums);
      if (i + 1 == tiles) {
        fetch_next(tile);
        hide_after(scores, keys.count - i * ROWS);
      }
      const float2 kept = soften(scores, most, total);
      pack_weights(scores, weights);
      scale_rows(sums, kept);
      barrier_wait(values_here(i), 0);
      products_begin();
      add_rows<T, width>(sums, weights, value_tile(i));
      products_commit();
    }
    products_wait<0>();
    pin(sums);
    store(tile, sums, most, total);
  }

  // scores -> exp2(scale (score - most so far)), their sums; returns what earlier sums of each row are to be
  // multiplied by.
  __device__ float2 soften(float (&scores)[32], float (&most)[2], float (&total)[2]) const {
    float kept[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = most[half];
#pragma unroll
      for (int i = 2 * half; i < 32; i += 4) largest = fmaxf(largest, fmaxf(scores[i], scores[i + 1]));
      largest = fmaxf(largest, exchange(largest, 1));
      largest = fmaxf(largest, exchange(largest, 2));
      kept[half] = fast_exp2((most[half] - largest) * scale);
      most[half] = largest;
      const float shift = largest * scale;
      float sum = 0;
#pragma unroll
      for (int i = 2 * half; i < 32; i += i % 2 ? 3 : 1) {
        scores[i] = fast_exp2(fmaf(scores[i], scale, -shift));
        sum += scores[i];
      }
      total[half] = total[half] * kept[half] + sum;
    }
    return {kept[0], kept[1]};
  }

  __device__ static void pack_weights(const float (&scores)[32], uint32_t (&weights)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) weights[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }

  __device__ static void scale_rows(float (&sums)[width / 2], float2 kept) {
#pragma unroll
    for (int i = 0; i < width / 2; ++i) sums[i] *= i & 2 ? kept.y : kept.x;
  }

  __device__ void store(int tile, const float (&sums)[width / 2], const float (&most)[2],
                        float (&total)[2]) const {
    const int first = tile * ROWS, count = queries.count - first;
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += exchange(total[half], 1);
      total[half] += exchange(total[half], 2);
      factors[half] = tiles ? 1 / total[half] : 0;
      const int row = fragment_row() + 8 * half;
      if (threadIdx.x % 4 == 0 && row < count)
        *lse_of(p.lse, queries, first + row, head) =
            tiles ? most[half] * p.shape.scale + logf(total[half]) : -INFINITY;
    }
    store_tile<T, width>(sums, factors, row_of(p.out, queries, first, head), p.out.row, count);
  }
};

// Rows of a packed axis behind its last sequence.
template <int width> __device__ void clear_unused(const ForwardArgs& p, int head) {
  const Rows rows = {0, p.shape.cu_seqlens[p.sequences], 0};
  clear_output<width>(p.out, rows, p.tokens, head);
  for (int i = threadIdx.x; i < p.tokens - rows.first; i += blockDim.x)
    *lse_of(p.lse, rows, i, head) = -INFINITY;
}

// Two blocks a multiprocessor, so that one computes while the other waits for memory, where registers allow.
template <class T, int width>
__global__ void __launch_bounds__(2 * THREADS, width <= 96 ? 2 : 1)
    masked_attention_forward_cuda_kernel(const __grid_constant__ ForwardArgs p) {
  const int heads = static_cast<int>(p.shape.heads), s = blockIdx.x / heads, head = blockIdx.x % heads;
  if (s == p.sequences)
    clear_unused<width>(p, head);
  else
    Forward<T, width>(p, s, head).run();
}

template <class T, int width> static void forward(const MaskedAttentionCudaParams& p) {
  const AttentionShape& shape = p.shape;
  ForwardArgs args{};
  args.q = maps_of<width>(p.q, shape.heads);
  args.k = maps_of<width>(p.k, shape.key_heads);
  args.v = maps_of<width>(p.v, shape.key_heads);
  args.shape = shape;
  args.out = p.out;
  args.lse = p.lse;
  args.tokens = static_cast<int>(p.q.count);
  args.sequences = static_cast<int>(p.sequences);
  args.key_tiles = room_for(shape.most_keys);
  // One warpgroup where a second one would leave no room for a second block.
  const auto bytes = [&](int warpgroups) {
    return 1024 + (warpgroups + 2 * args.key_tiles) * Tile<width>::bytes;
  };
  const bool one = shape.most_queries <= ROWS || (bytes(2) > HALF && bytes(1) <= HALF);
  const int warpgroups = one ? 1 : 2;
  const int64_t sequences = p.sequences + (shape.cu_seqlens ? 1 : 0);
  launch(OP, masked_attention_forward_cuda_kernel<T, width>,
         {sequences * shape.heads, warpgroups * THREADS, bytes(warpgroups), p.device, p.stream}, args);
}

void masked_attention_forward_cuda(const MaskedAttentionCudaParams& p) {
  for_kernel(p.shape, [&](auto type, auto width) { forward<decltype(type), decltype(width)::value>(p); });
}

} // namespace jepa
