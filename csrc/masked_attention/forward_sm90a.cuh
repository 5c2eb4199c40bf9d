// What one block of the forward kernel does: heads of one sequence, or of sequences of one length, one after
// another. Each warpgroup takes 64 queries at a time. A tile of the next head is fetched as soon as all warps
// are done with the tile of this head in its place.
#pragma once
#include "masked_attention/launch_sm90a.cuh"

namespace jepa {

constexpr float LN_2 = 0.693147181f;

struct ForwardArgs {
  TileMaps q, k, v;
  AttentionShape shape;
  AttentionRows out, lse;
  int tokens, sequences;             // tokens: rows of the queries' axis; not packed, all is one sequence
  int heads, all, groups;            // of a plane, of a sequence; blocks of a sequence, which take turns
  int group, key_tiles, query_tiles; // heads of queries for one of keys; room for keys; of each warpgroup
};

// Heads are counted through the planes of the tensors, `heads` in each.
struct Head {
  int plane, at;

  __device__ Head(int number, int heads) : plane(number / heads), at(number - plane * heads) {}
  __device__ void advance(const Head& step, int heads) {
    plane += step.plane;
    at += step.at;
    if (at < heads) return;
    at -= heads;
    ++plane;
  }
};

template <class T, int width> struct Forward {
  static constexpr int BYTES = Tile<width>::bytes;
  static constexpr float SLACK = 8; // see soften
  const ForwardArgs& p;
  const int warpgroup = uniform(threadIdx.x / THREADS), warpgroups = blockDim.x / THREADS;
  const Head begin;
  const int count; // of heads
  const Head step{p.groups, p.heads};
  const Rows queries, keys;
  const int tiles = tiles_of(keys.count), query_tiles = tiles_of(queries.count);
  const int readers = THREADS / 32 * (query_tiles < warpgroups ? query_tiles : warpgroups);
  const float scale = p.shape.scale * LOG2_E;

  // Shared memory: slots of keys, values and queries; before them a barrier and a counter for each.
  const Address base = shared_memory();

  // `count` heads of sequence s.
  __device__ Forward(const ForwardArgs& args, int s, const Head& begin, int count)
      : p(args), begin(begin), count(count),
        queries(rows_of(args.shape.cu_seqlens, args.shape.queries, s, ROWS * MOST_TILES)),
        keys(rows_of(args.shape.k_cu_seqlens, args.shape.keys, s, ROWS * args.key_tiles)) {}

  __device__ int value_slot(int i) const { return p.key_tiles + i; }
  __device__ int query_slot(int i) const { return 2 * p.key_tiles + warpgroup * p.query_tiles + i; }
  __device__ Address barrier(int slot) const { return base + 8 * slot; }
  __device__ Address counter(int slot) const { return base + 512 + 4 * slot; }
  __device__ Address tile_at(int slot) const { return base + 1024 + slot * BYTES; }

  __device__ void fetch(int slot, const TileMaps& from, const Rows& rows, int tile, int plane,
                        int head) const {
    barrier_expect(barrier(slot), BYTES);
    load_tile<width>(tile_at(slot), from, barrier(slot), {plane, rows.first, rows.count}, tile, head);
  }
  __device__ int key_head(const Head& head) const { return p.group == 1 ? head.at : head.at / p.group; }
  __device__ void fetch_keys(int i, const Head& head) const {
    fetch(i, p.k, keys, i, head.plane, key_head(head));
  }
  __device__ void fetch_values(int i, const Head& head) const {
    fetch(value_slot(i), p.v, keys, i, head.plane, key_head(head));
  }

  // A warpgroup's tiles of queries, head after head, and the slots they go to in turn.
  struct Turn {
    Head head;
    int number, tile, slot, parity; // number: of the block's heads
  };
  __device__ void advance(Turn& t) const {
    t.tile += warpgroups;
    if (t.tile >= query_tiles) {
      t.tile = warpgroup;
      ++t.number;
      t.head.advance(step, p.heads);
    }
    if (++t.slot == p.query_tiles) {
      t.slot = 0;
      t.parity ^= 1;
    }
  }
  __device__ void fetch_queries(const Turn& t) const {
    fetch(query_slot(t.slot), p.q, queries, t.tile, t.head.plane, t.head.at);
  }

  // True in one thread: of the last of `warps` to be done with a slot.
  __device__ bool last_of(int slot, int warps) const {
    return threadIdx.x % 32 == 0 && count_up(counter(slot), warps - 1) == warps - 1;
  }
  __device__ void refill_keys(int i, const Head& head) const {
    if (last_of(i, readers)) fetch_keys(i, head);
  }
  __device__ void refill_values(int i, const Head& head) const {
    if (last_of(value_slot(i), readers)) fetch_values(i, head);
  }
  __device__ void refill_queries(Turn& coming) const {
    if (coming.number < count && last_of(query_slot(coming.slot), THREADS / 32)) fetch_queries(coming);
    advance(coming);
  }

  __device__ void run() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2 * p.key_tiles + warpgroups * p.query_tiles; ++i) {
        barrier_init(barrier(i));
        store_shared(counter(i), 0.f);
      }
      publish_barriers();
    }
    __syncthreads();
    if (warpgroup >= query_tiles) return;
    Turn coming{begin, 0, warpgroup, 0, 0}, turn = coming;
    for (int i = 0; i < p.query_tiles && coming.number < count; ++i, advance(coming))
      if (threadIdx.x % THREADS == 0) fetch_queries(coming);
    if (threadIdx.x == 0)
      for (int i = 0; i < tiles; ++i) {
        fetch_keys(i, begin);
        fetch_values(i, begin);
      }
    for (; turn.number < count; advance(turn)) attend(turn, coming);
  }

  // Of 64 queries, over the keys so far: the sums of weighted values, the largest score, the sum of weights.
  struct Running {
    float sums[width / 2], most[2], total[2];
  };

  __device__ void attend(const Turn& turn, Turn& coming) const {
    Running r{{}, {-INFINITY, -INFINITY}, {}};
    const bool refill = turn.tile + warpgroups >= query_tiles && turn.number + 1 < count;
    Head next = turn.head;
    next.advance(step, p.heads);
    barrier_wait(barrier(query_slot(turn.slot)), turn.parity);
    const auto refill_behind = [&](int i) {
      if (refill) {
        refill_keys(i, next);
        if (i > 0) refill_values(i - 1, next);
      }
      if (i + 1 == tiles) refill_queries(coming);
    };
    const int full = (keys.count + 15) / ROWS, left = keys.count - full * ROWS;
    for (int i = 0; i < full; ++i) add_keys<64>(i, turn, r, refill_behind);
    if (left > 16) {
      add_keys<48>(full, turn, r, refill_behind);
      finish(r);
    } else if (left > 0) {
      add_keys<16>(full, turn, r, refill_behind);
      finish(r);
    } else {
      finish(r);
    }
    if (refill) refill_values(tiles - 1, next);
    store(turn, r);
  }

  __device__ static void finish(Running& r) {
    products_wait<0>();
    pin(r.sums);
  }

  // The first `columns` keys and values of tile i, no more than are in it but for the last 16 or 32. The
  // product with keys runs beside that of the weights and values before them.
  template <int columns, class Refill>
  __device__ void add_keys(int i, const Turn& turn, Running& r, const Refill& refill_behind) const {
    float scores[columns / 2], kept[2];
    uint32_t weights[columns / 4];
    const int parity = turn.number & 1;
    barrier_wait(barrier(i), parity);
    products_begin();
    multiply_tiles<T, width, columns>(scores, tile_at(query_slot(turn.slot)), tile_at(i));
    products_commit();
    products_wait<0>();
    pin(scores);
    pin(r.sums);
    refill_behind(i);
    hide_after(scores, keys.count - i * ROWS);
    if (soften(scores, r, kept)) scale_rows(r.sums, kept);
#pragma unroll
    for (int n = 0; n < columns / 4; ++n) weights[n] = pack<T>(scores[2 * n], scores[2 * n + 1]);
    barrier_wait(barrier(value_slot(i)), parity);
    if (i + 1 == tiles && turn.tile == warpgroup) clear_behind<columns>();
    products_begin();
    add_rows<T, width>(r.sums, weights, tile_at(value_slot(i)));
    products_commit();
  }

  // Zeros behind the last value, where tensor maps find rows of another sequence. Every warpgroup writes
  // them, so that none waits for another.
  template <int columns> __device__ void clear_behind() const {
    const int first = keys.count - (tiles - 1) * ROWS;
    if (!p.shape.k_cu_seqlens || first == columns) return;
    clear_rows<width, columns>(tile_at(value_slot(tiles - 1)), first, threadIdx.x % THREADS, THREADS);
    publish_shared();
    warpgroup_barrier(warpgroup);
  }

  // scores -> exp2(scale (score - most)), and their sums. `most` follows the largest score only when that has
  // grown by SLACK powers of two, so that `kept`, what earlier sums of a row are to be multiplied by, is
  // mostly 1; returns whether it is not, in some row of the warp.
  template <int n> __device__ bool soften(float (&scores)[n], Running& r, float (&kept)[2]) const {
    bool grown = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float pair[2] = {scores[2 * half], scores[2 * half + 1]}, sum[2] = {};
#pragma unroll
      for (int i = 2 * half + 4; i < n; i += 4) {
        pair[0] = fmaxf(pair[0], scores[i]);
        pair[1] = fmaxf(pair[1], scores[i + 1]);
      }
      float largest = fmaxf(pair[0], pair[1]);
      largest = fmaxf(largest, exchange(largest, 1));
      largest = fmaxf(largest, exchange(largest, 2));
      const float growth = (largest - r.most[half]) * scale;
      kept[half] = growth > SLACK ? fast_exp2(-growth) : 1;
      if (growth > SLACK) r.most[half] = largest;
      grown |= growth > SLACK;
      const float shift = r.most[half] * scale;
#pragma unroll
      for (int i = 2 * half; i < n; i += i % 2 ? 3 : 1) {
        scores[i] = fast_exp2(fmaf(scores[i], scale, -shift));
        sum[i % 2] += scores[i];
      }
      r.total[half] = r.total[half] * kept[half] + (sum[0] + sum[1]);
    }
    return any_lane(grown);
  }

  __device__ static void scale_rows(float (&sums)[width / 2], const float (&kept)[2]) {
#pragma unroll
    for (int i = 0; i < width / 2; ++i) sums[i] *= kept[i / 2 % 2];
  }

  __device__ void store(const Turn& turn, const Running& r) const {
    const int first = turn.tile * ROWS, left = queries.count - first;
    const Rows rows = {turn.head.plane, queries.first, queries.count};
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = r.total[half];
      total += exchange(total, 1);
      total += exchange(total, 2);
      factors[half] = fast_reciprocal(total);
      const int row = fragment_row() + 8 * half;
      if (threadIdx.x % 4 == 0 && row < left)
        *lse_of(p.lse, rows, first + row, turn.head.at) =
            r.most[half] * p.shape.scale + fast_log2(total) * LN_2;
    }
    store_tile<T, width>(r.sums, factors, row_of(p.out, rows, first, turn.head.at), p.out.row, left);
  }
};

} // namespace jepa
