// The functions of csrc/common/hopper.cuh on the host, for tests: in place of that file on the include path.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common/dtype.h"
#include "matrix.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace jepa {

using Address = uint32_t;

struct float2 {
  float x, y;
};

struct alignas(16) Words {
  uint32_t at[4];
};

// Four dimensions, innermost first; a box is one line of the innermost and some rows of the second.
struct TensorMap {
  const uint8_t* data;
  int64_t sizes[4], strides[4]; // in bytes
  int line, rows;
};

struct Barrier {
  int64_t expected = 0; // bytes armed for, and not yet arrived
  int arrivals = 1;     // awaited in this phase
  int phase = 0;
  std::vector<std::function<void()>> loads; // under way: they arrive only once somebody waits
};

// What a block has beyond its threads; begun anew with every block.
struct Hopper {
  std::map<Address, Barrier> barriers;
  std::map<int, Products> products; // by warpgroup
  std::map<int, std::array<uint64_t, 32>> lanes;
};
inline Hopper hopper;

inline Address shared_memory() { return Block::BASE; }

template <class T> T read_shared(Address from) {
  Block& block = *Block::current();
  const int self = static_cast<int>(threadIdx.x) + 1;
  T x;
  std::memcpy(&x, block.at(from, sizeof(T)), sizeof(T));
  for (size_t i = 0; i < sizeof(T); ++i)
    if (const int writer = block.unordered[from - Block::BASE + i]; writer && writer != self)
      fault("a thread reads another's store that no barrier has ordered");
  return x;
}
template <class T> void write_shared(Address to, const T& x) {
  Block& block = *Block::current();
  std::memcpy(block.at(to, sizeof(T)), &x, sizeof(T));
  for (uint32_t byte = to - Block::BASE; byte < to - Block::BASE + sizeof(T); ++byte) {
    block.unpublished[byte] = block.unordered[byte] = static_cast<int>(threadIdx.x) + 1;
    block.stored.push_back(byte);
  }
}
inline Words load_shared(Address from) { return read_shared<Words>(from); }
inline float load_shared_float(Address from) { return read_shared<float>(from); }
inline float2 load_shared_pair(Address from) { return read_shared<float2>(from); }
inline void store_shared(Address to, const Words& w) { write_shared(to, w); }
inline void store_shared(Address to, float x) { write_shared(to, x); }
inline void store_shared(Address to, uint32_t x) { write_shared(to, x); }
inline void publish_shared() {
  for (int& owner : Block::current()->unpublished)
    if (owner == static_cast<int>(threadIdx.x) + 1) owner = 0;
}

inline Words load_global(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) fault("a 16-byte load that is not aligned");
  return *static_cast<const Words*>(from);
}
inline void store_global(void* to, const Words& w) {
  if (reinterpret_cast<uintptr_t>(to) % 16) fault("a 16-byte store that is not aligned");
  *static_cast<Words*>(to) = w;
}

inline void barrier_init(Address barrier) {
  Block::current()->at(barrier, 8);
  hopper.barriers[barrier] = {};
}
inline void publish_barriers() {}
inline Barrier& barrier_at(Address barrier) {
  const auto found = hopper.barriers.find(barrier);
  if (found == hopper.barriers.end()) fault("a barrier that was not initialised");
  return found->second;
}
inline void complete(Barrier& b) {
  if (b.arrivals || b.expected) return;
  b.phase ^= 1;
  b.arrivals = 1;
}
inline void barrier_expect(Address barrier, int bytes) {
  Barrier& b = barrier_at(barrier);
  if (b.arrivals == 0) fault("a barrier armed twice in one phase");
  b.arrivals = 0;
  b.expected += bytes;
  complete(b);
}
inline void barrier_wait(Address barrier, int parity) {
  Barrier& b = barrier_at(barrier);
  Block::current()->wait_until([&] {
    const auto loads = std::move(b.loads);
    b.loads.clear();
    for (const auto& load : loads) load();
    return b.phase != parity;
  });
}

inline void copy_box(Address to, const TensorMap& map, const std::array<int, 4>& corner) {
  Block& block = *Block::current();
  for (int row = 0; row < map.rows; ++row)
    for (int i = 0; i < map.line / 2; ++i) {
      const int64_t at[4] = {corner[0] + i, corner[1] + row, corner[2], corner[3]};
      const uint8_t* from = map.data;
      bool inside = true;
      for (int d = 0; d < 4; ++d) {
        inside &= at[d] >= 0 && at[d] < map.sizes[d];
        from += at[d] * map.strides[d];
      }
      const Address place = swizzled(to + row * map.line + 2 * i, map.line);
      if (block.unpublished[place - Block::BASE])
        fault("a copy lands on a store that no fence has published");
      const uint16_t zero = 0;
      fetched += inside ? 2 : 0;
      std::memcpy(block.at(place, 2), inside ? from : reinterpret_cast<const uint8_t*>(&zero), 2);
    }
}
inline void load_box(Address to, const TensorMap& map, Address barrier, int x, int y, int z, int w) {
  if (to % 128) fault("a copy to an address that is not a multiple of 128");
  const auto load = [=] {
    copy_box(to, map, {x, y, z, w});
    Barrier& b = barrier_at(barrier);
    b.expected -= int64_t(map.line) * map.rows;
    if (b.expected < 0) fault("more bytes arrive than the barrier was armed for");
    complete(b);
  };
  if (eager)
    load();
  else
    barrier_at(barrier).loads.push_back(load);
}

enum Group { ALL, WARPGROUP = 100, WARP = 200, MATRIX = 300 };

inline void __syncthreads() {
  Block& block = *Block::current();
  block.meet(ALL, static_cast<int>(blockDim.x), [&] { block.order(0, blockDim.x); });
}
inline void warpgroup_barrier(int warpgroup) {
  Block& block = *Block::current();
  block.meet(WARPGROUP + warpgroup, 128, [&] { block.order(128 * warpgroup, 128 * (warpgroup + 1)); });
}

template <class T> T shuffle(T x, int from) {
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  hopper.lanes[warp][lane] = bits;
  Block::current()->meet(WARP + warp, 32, [] {});
  std::memcpy(&x, &hopper.lanes[warp][from], sizeof(T));
  Block::current()->meet(WARP + warp, 32, [] {});
  return x;
}
inline int uniform(int x) { return shuffle(x, 0); }
template <class T> T exchange(T x, int lanes) {
  return shuffle(x, static_cast<int>(threadIdx.x % 32) ^ lanes);
}

inline bool any_lane(bool x) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  static std::map<int, int> votes;
  static bool outcome[32];
  votes[warp] += x;
  Block::current()->meet(WARP + warp, 32, [&] { outcome[warp] = std::exchange(votes[warp], 0) > 0; });
  const bool any = outcome[warp];
  Block::current()->meet(WARP + warp, 32, [] {});
  return any;
}
inline int count_up(Address counter, int last) {
  Block& block = *Block::current();
  int before;
  std::memcpy(&before, block.at(counter, 4), 4);
  const int after = before >= last ? 0 : before + 1;
  std::memcpy(block.at(counter, 4), &after, 4);
  return before;
}

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_log2(float x) { return std::log2(x); }
inline float fast_reciprocal(float x) { return 1 / x; }

template <class T> float widen(uint16_t bits) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t word = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
  } else {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return static_cast<float>(x);
  }
}
template <class T> uint16_t narrow(float x) {
  uint16_t half;
  if constexpr (std::is_same_v<T, bf16>) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    half = std::isnan(x) ? 0x7fff : static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  } else {
    const _Float16 y = static_cast<_Float16>(x);
    std::memcpy(&half, &y, 2);
  }
  return half;
}
template <class T> uint32_t pack(float low, float high) {
  return narrow<T>(low) | uint32_t(narrow<T>(high)) << 16;
}
template <class T> float2 unpack(uint32_t pair) {
  return {widen<T>(static_cast<uint16_t>(pair)), widen<T>(static_cast<uint16_t>(pair >> 16))};
}

inline int warpgroup_of() { return static_cast<int>(threadIdx.x / 128); }
template <class Together> void together(const Together& act) {
  const int warpgroup = warpgroup_of();
  Block::current()->meet(MATRIX + warpgroup, 128, [&] { act(hopper.products[warpgroup]); });
}
inline void products_begin() {
  together([](Products& p) { p.begun = true; });
}
inline void products_commit() {
  together([](Products& p) { p.commit(); });
}
template <int pending> void products_wait() {
  together([](Products& p) { p.wait(pending); });
}
template <int count> void pin(float (&)[count]) {}

// Every thread of the warpgroup brings its registers; the last one issues the product.
template <class T>
void issue(float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, int columns, bool add,
           bool by_columns = false) {
  Product& coming = hopper.products[warpgroup_of()].coming;
  const int thread = static_cast<int>(threadIdx.x % 128);
  coming.sums[thread] = d;
  if (a_registers) std::copy_n(a_registers, 4, coming.weights[thread].begin());
  together([&](Products& p) {
    p.coming.a = a;
    p.coming.b = b;
    p.coming.columns = columns;
    p.coming.from_registers = a_registers != nullptr;
    p.coming.by_columns = by_columns;
    p.coming.accumulate = add;
    p.coming.widen = widen<T>;
    p.add(p.coming);
  });
}
template <class T, int columns = 64> void multiply_shared(float* d, uint64_t a, uint64_t b, int accumulate) {
  issue<T>(d, nullptr, a, b, columns, accumulate);
}
template <class T, int columns> void multiply_registers(float* d, const uint32_t* a, uint64_t b) {
  issue<T>(d, a, 0, b, columns, true);
}

template <class T, int columns> void multiply_columns(float* d, uint64_t a, uint64_t b) {
  issue<T>(d, nullptr, a, b, columns, true, true);
}

} // namespace jepa
