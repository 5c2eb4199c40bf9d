// What one block of the backward kernel does: one head of one sequence.
#pragma once
#include "masked_attention/delta_sm90a.cuh"
#include "masked_attention/launch_sm90a.cuh"

namespace jepa {

struct BackwardArgs {
  TileMaps q, k, v, grad;
  AttentionShape shape;
  AttentionRows out, lse, dq, dk, dv;
  int tokens, k_tokens, sequences, room; // rows of the two axes; room: tiles of a sequence in shared memory
  int blocks;                            // of a sequence
  bool both;                             // short sequences are taken by one block a head
};

// The most warpgroups of a block: wider sums leave no registers to tell them apart.
template <int width> constexpr int WARPGROUPS = width == 88 || width == 96 ? 2 : 1;

enum class Pass { keys, queries, both };

// A warpgroup takes 64 rows at a time, its own; all rows of the other side stay in shared memory. In the pass
// of keys, keys and values are its own, queries and gradients stay; in that of queries the other way round.
// With a, b = k, v or q, grad:
//     scores = own a . a^T,  dweights = own b . b^T,  weights = exp(scale scores - lse)
//     dscores = weights (dweights - delta),  delta[i] = grad[i] . out[i]
//     d own a = scale dscores a,  d own b = weights b (of keys only)
// The pass of both is that of keys where all keys stay too, and then dq = scale dscores^T k.
template <class T, int width, Pass pass> struct Backward {
  static constexpr int BYTES = Tile<width>::bytes;
  static constexpr bool of_keys = pass != Pass::queries, both = pass == Pass::both;
  static constexpr int SHORT = 2; // tiles of a sequence that the pass of both takes
  const BackwardArgs& p;
  // How many heads of queries meet here, the first of them, and their head of keys.
  const int heads, first_head, key_head;
  const Rows queries, keys;
  const float scale = p.shape.scale * LOG2_E;
  const int warpgroup = WARPGROUPS<width> == 1 || both ? 0 : uniform(threadIdx.x / THREADS);
  const int warpgroups = WARPGROUPS<width> == 1 || both ? 1 : blockDim.x / THREADS;

  // Shared memory: barriers; lse and delta of queries; own tiles, of each warpgroup or all; the others' of a,
  // then of b; d scores.
  const Address others_here = shared_memory();
  const Address lse = others_here + 1024, delta = lse + 4 * ROWS * MOST_TILES, tiles_here = lse + 2048;
  const int room = both && p.room > SHORT ? SHORT : p.room, own_room = both ? room : warpgroups;
  const Address others_a = tiles_here + 2 * own_room * BYTES;

  static int shared_bytes(int own_room, int room) { return 1024 + 2048 + 2 * (own_room + room) * BYTES; }
  static int shared_bytes_of_both(int room) {
    const int tiles = room < SHORT ? room : SHORT, dscores = REUSES_VALUES ? tiles : tiles * tiles;
    return shared_bytes(tiles, tiles) + dscores * Tile<ROWS>::bytes;
  }

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
  __device__ Address tile_b(int i) const { return tile_a(room + i); }
  __device__ int own_slot(int tile) const { return both ? tile : warpgroup; }
  __device__ Address own_here(int tile) const { return others_here + 8 + 8 * own_slot(tile); }
  __device__ Address own_a(int tile) const { return tiles_here + 2 * own_slot(tile) * BYTES; }
  __device__ Address own_b(int tile) const { return own_a(tile) + BYTES; }

  // d scores of a tile of keys and one of queries, keys by queries. Those of the second tile of keys lie
  // where values were, if a tile of them is large enough.
  static constexpr bool REUSES_VALUES = BYTES >= Tile<ROWS>::bytes;
  __device__ Address kept(int key_tile, int query_tile) const {
    if (REUSES_VALUES && key_tile > 0) return own_b(query_tile);
    return tile_b(room) + (key_tile * room + query_tile) * Tile<ROWS>::bytes;
  }

  __device__ void run() const {
    if (own().count == 0) return;
    if (threadIdx.x == 0) {
      for (int i = 0; i <= own_room; ++i) barrier_init(others_here + 8 * i);
      publish_barriers();
    }
    __syncthreads();
    fetch_own(warpgroup);
    if (both) fetch_own(1);
    Outputs<width> next = of_keys ? Outputs<width>{} : outputs_of(warpgroup, first_head);
    if (heads == 1) bring_others(first_head, 0);
#pragma unroll 1
    for (int i = warpgroup, turn = 0; i * ROWS < own().count; i += warpgroups, ++turn) {
      float da[width / 2] = {}, db[of_keys ? width / 2 : 1] = {};
#pragma unroll 1
      for (int j = 0; j < heads; ++j) {
        if (heads > 1) bring_others(first_head + j, (turn * heads + j) & 1);
        if (j == 0) await_own(i, both ? 0 : turn & 1);
        if (!of_keys) {
          summarise(next, own_b(i), i, warpgroup);
          next = outputs_of(i + warpgroups, first_head);
        }
        warpgroup_barrier(warpgroup);
        if (of_keys && few_keys()) sum_means_of_queries();
        if (tiles() > 0) add_products(i, da, db);
      }
      warpgroup_barrier(warpgroup); // nobody reads this tile
      if (!both) fetch_own(i + warpgroups);
      store(i, da, db);
    }
    if constexpr (both) multiply_kept();
  }

  __device__ void fetch_own(int tile) const {
    if (threadIdx.x % THREADS || tile * ROWS >= own().count) return;
    const Address here = own_here(tile);
    barrier_expect(here, 2 * BYTES);
    load_tile<width>(own_a(tile), of_keys ? p.k : p.q, here, own(), tile, of_keys ? key_head : first_head);
    load_tile<width>(own_b(tile), of_keys ? p.v : p.grad, here, own(), tile, of_keys ? key_head : first_head);
  }

  __device__ void await_own(int tile, int parity) const {
    barrier_wait(own_here(tile), parity);
    const int count = keys.count - tile * ROWS;
    if (!of_keys || count >= ROWS || !(both || few_keys())) return;
    clear_rows<width>(own_a(tile), count, threadIdx.x % THREADS, THREADS);
    clear_rows<width>(own_b(tile), count, threadIdx.x % THREADS, THREADS);
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
    if constexpr (of_keys)
      summarise_all(head, parity);
    else
      await_others(parity);
    __syncthreads();
  }
  __device__ void await_others(int parity) const {
    barrier_wait(others_here, parity);
    const int last = others().count % ROWS;
    if (last == 0) return;
    clear_rows<width>(tile_a(tiles() - 1), last, threadIdx.x, blockDim.x);
    clear_rows<width>(tile_b(tiles() - 1), last, threadIdx.x, blockDim.x);
    publish_shared();
  }

  __device__ Outputs<width> outputs_of(int tile, int head) const {
    const int row = tile * ROWS + threadIdx.x % THREADS / 2;
    if (row >= queries.count) return {};
    return {row_of(p.out, queries, row, head), *lse_of(p.lse, queries, row, head)};
  }

  // lse in units of log 2 and delta of a tile of queries. A query behind the last one gets an infinite lse:
  // its weights are 0.
  __device__ void summarise(const Outputs<width>& x, Address grads, int tile, int slot) const {
    const int row = threadIdx.x % THREADS / 2, at = 4 * (slot * ROWS + row);
    const bool there = tile * ROWS + row < queries.count;
    const float sum = delta_of<T>(x, grads, there);
    if (threadIdx.x % 2) return;
    store_shared(delta + at, sum);
    store_shared(lse + at, there ? x.lse * LOG2_E : INFINITY);
  }

  // Outputs of several tiles are under way at once, the first of them while the others' tiles are.
  __device__ void summarise_all(int head, int parity) const {
    constexpr int AT_ONCE = width <= 80 ? 2 : 1;
    Outputs<width> x[AT_ONCE];
#pragma unroll 1
    for (int first = warpgroup; first == warpgroup || first < tiles(); first += AT_ONCE * warpgroups) {
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) x[i] = outputs_of(first + i * warpgroups, head);
      if (first == warpgroup) await_others(parity);
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)
        if (const int tile = first + i * warpgroups; tile < tiles())
          summarise(x[i], tile_b(tile), tile, tile);
    }
  }

  // Whether the next weights are computed before the sums have read the last: registers for two sets.
  static constexpr bool SUMS_WAIT = width <= 64;

  // The sums over a tile run beside the products with the next one, and those beside its weights.
  __device__ void add_products(int own_tile, float (&da)[width / 2],
                               float (&db)[of_keys ? width / 2 : 1]) const {
    float scores[32], dweights[32];
    uint32_t weights[16], dscores[16];
    const Address a = own_a(own_tile), b = own_b(own_tile);
    products_begin();
    multiply_tiles<T, width>(scores, a, tile_a(0));
    products_commit();
    products_begin();
    multiply_tiles<T, width>(dweights, b, tile_b(0));
    products_commit();
    differentiate(0, scores, dweights, weights, dscores);
#pragma unroll 1
    for (int i = 0; i + 1 < tiles(); ++i) {
      if constexpr (both) keep(dscores, own_tile, i);
      products_begin();
      multiply_tiles<T, width>(scores, a, tile_a(i + 1));
      if (SUMS_WAIT) {
        products_commit();
        products_begin();
      }
      add_tile(da, db, weights, dscores, i);
      if (!SUMS_WAIT) {
        products_commit();
        products_begin();
      }
      multiply_tiles<T, width>(dweights, b, tile_b(i + 1));
      products_commit();
      differentiate(i + 1, scores, dweights, weights, dscores);
    }
    const int last = uniform(tiles() - 1);
    if constexpr (both) keep(dscores, own_tile, last);
    products_begin();
    add_tile(da, db, weights, dscores, last);
    products_commit();
    products_wait<0>();
    pin(da);
    pin(db);
  }
  __device__ void add_tile(float (&da)[width / 2], float (&db)[of_keys ? width / 2 : 1],
                           const uint32_t (&weights)[16], const uint32_t (&dscores)[16], int tile) const {
    if constexpr (of_keys) add_rows<T, width>(db, weights, tile_b(tile));
    add_rows<T, width>(da, dscores, tile_a(tile));
  }

  // Queries are columns here in the pass of keys, rows in that of queries.
  __device__ void differentiate(int tile, float (&scores)[32], float (&dweights)[32], uint32_t (&weights)[16],
                                uint32_t (&dscores)[16]) const {
    const int column = tile * ROWS + fragment_column(), row = warpgroup * ROWS + fragment_row();
    products_wait<1>();
    pin(scores);
    if (!of_keys && tile + 1 == tiles()) hide_after(scores, keys.count - tile * ROWS);
    const float2 rows[2] = {statistics(lse, row), statistics(lse, row + 8)};
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      const float2 pair = of_keys ? load_shared_pair(lse + 4 * (column + i / 2 * 8)) : float2{};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 l = of_keys ? pair : rows[half];
        float* score = scores + 2 * (i + half);
        score[0] = fast_exp2(fmaf(score[0], scale, -l.x));
        score[1] = fast_exp2(fmaf(score[1], scale, -l.y));
      }
    }
    pin(scores);
    products_wait<0>();
    pin(scores);
    pin(dweights);
    float2 means[2] = {statistics(delta, row), statistics(delta, row + 8)};
    if (!of_keys && few_keys()) means_of(scores, dweights, means);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (of_keys && i % 2 == 0) means[0] = means[1] = load_shared_pair(delta + 4 * (column + i / 2 * 8));
      const float2 mean = means[i % 2];
      weights[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
      dscores[i] = pack<T>(scores[2 * i] * (dweights[2 * i] - mean.x),
                           scores[2 * i + 1] * (dweights[2 * i + 1] - mean.y));
    }
  }
  // Of a row of queries.
  __device__ static float2 statistics(Address of, int query) {
    const float x = of_keys ? 0 : load_shared_float(of + 4 * query);
    return {x, x};
  }

  // means_of in the pass of keys, from products whose rows are queries.
  __device__ void sum_means_of_queries() const {
#pragma unroll 1
    for (int i = 0; i < tiles(); ++i) {
      float scores[32], dweights[32];
      float2 means[2];
      const int row = i * ROWS + fragment_row();
      const float l[2] = {load_shared_float(lse + 4 * row), load_shared_float(lse + 4 * (row + 8))};
      multiply_pair(scores, dweights, tile_a(i), own_a(0), tile_b(i), own_b(0));
      hide_after(scores, keys.count);
#pragma unroll
      for (int j = 0; j < 32; ++j) scores[j] = fast_exp2(fmaf(scores[j], scale, -l[j / 2 % 2]));
      means_of(scores, dweights, means);
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

  // Keys behind the last have weights here, which no sum over keys may see.
  __device__ void keep(const uint32_t (&dscores)[16], int key_tile, int query_tile) const {
    if (REUSES_VALUES && key_tile == 1 && query_tile == 1)
      warpgroup_barrier(warpgroup); // all have read values
    const Address to = kept(key_tile, query_tile) + Tile<ROWS>::at(fragment_row(), fragment_column());
    const int left = keys.count - key_tile * ROWS - fragment_row();
#pragma unroll
    for (int i = 0; i < 16; ++i) // 16-byte words of a line change places by its number alone
      store_shared((to ^ i / 2 * 16) + i % 2 * 8 * 128, i % 2 * 8 < left ? dscores[i] : 0u);
  }

  __device__ void multiply_kept() const {
    publish_shared();
    warpgroup_barrier(warpgroup);
#pragma unroll 1
    for (int i = 0; i < tiles(); ++i) {
      float dq[width / 2] = {};
      pin(dq); // the compiler would clear it behind the fence
      products_begin();
#pragma unroll 1
      for (int j = 0; j * ROWS < keys.count; ++j) add_columns<T, width>(dq, kept(j, i), own_a(j));
      products_commit();
      products_wait<0>();
      pin(dq);
      store_tile<T, width>(dq, {p.shape.scale, p.shape.scale}, row_of(p.dq, queries, i * ROWS, first_head),
                           p.dq.row, queries.count - i * ROWS);
    }
  }

  __device__ void store(int tile, const float (&da)[width / 2],
                        const float (&db)[of_keys ? width / 2 : 1]) const {
    const int first = tile * ROWS, count = own().count - first, h = of_keys ? key_head : first_head;
    const AttentionRows& to = of_keys ? p.dk : p.dq;
    store_tile<T, width>(da, {p.shape.scale, p.shape.scale}, row_of(to, own(), first, h), to.row, count);
    if constexpr (of_keys) store_tile<T, width>(db, {1, 1}, row_of(p.dv, own(), first, h), p.dv.row, count);
  }
};

} // namespace jepa
