// Warpgroup matrix products, from the descriptors' bits. PTX ISA 9.7.15.5.1: "Register fragments", "Shared
// memory matrix layout", "Strides", "Matrix descriptor". Products are carried out where the warpgroup waits
// for them; until then their accumulators hold NaN, so that an early read shows.
#pragma once
#include <array>
#include <cmath>
#include <limits>

#include "block.h"

namespace jepa {

// Which 16-byte word of a line holds word `w`, by the address's bits above: "Swizzling modes".
inline uint32_t swizzled(uint32_t address, int line) {
  const uint32_t words = static_cast<uint32_t>(line) / 16;
  return address ^ ((address / 128 % words) * 16);
}

struct Operand {
  uint32_t start, leading, stride;
  int line;

  explicit Operand(uint64_t bits)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
    const int mode = static_cast<int>(bits >> 62);
    if (mode == 0 || (bits >> 49 & 7)) fault("descriptor of a layout that no kernel here uses");
    line = mode == 1 ? 128 : mode == 2 ? 64 : 32;
  }

  uint16_t read(uint32_t linear) const {
    const uint32_t address = swizzled(linear, line);
    Block& block = *Block::current();
    uint16_t bits;
    std::memcpy(&bits, block.at(address, 2), 2);
    if (block.unpublished[address - Block::BASE])
      fault("a product reads a store that no fence has published");
    return bits;
  }
  // Rows of 8 lines; 16 elements of the line from the start.
  uint16_t k_major(int row, int k) const { return read(start + row / 8 * stride + row % 8 * line + k * 2); }
  // Lines of columns: a line's worth of them, then `leading` bytes on; 8 k, then `stride` bytes on.
  uint16_t mn_major(int k, int column) const {
    const int wide = line / 2;
    return read(start + column / wide * leading + column % wide * 2 + k / 8 * stride + k % 8 * line);
  }
};

struct Product {
  std::array<float*, 128> sums{};
  std::array<std::array<uint32_t, 4>, 128> weights{};
  uint64_t a = 0, b = 0;
  int columns = 0;
  bool from_registers = false, accumulate = false;
  std::function<float(uint16_t)> widen;

  // Element (row, column) of the sums: thread and register.
  static std::pair<int, int> place(int row, int column) {
    const int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
    return {thread, column / 8 * 4 + row % 16 / 8 * 2 + column % 2};
  }
  float left(int row, int k) const {
    if (!from_registers) return widen(Operand(a).k_major(row, k));
    const int thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
    const uint32_t pair = weights[thread][k / 8 * 2 + row % 16 / 8];
    return widen(static_cast<uint16_t>(k % 2 ? pair >> 16 : pair));
  }
  float right(int k, int column) const {
    const Operand operand(b);
    return widen(from_registers ? operand.mn_major(k, column) : operand.k_major(column, k));
  }

  void run() const {
    float l[64][16], r[16][256];
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 64; ++row) l[row][k] = left(row, k);
      for (int column = 0; column < columns; ++column) r[k][column] = right(k, column);
    }
    for (int row = 0; row < 64; ++row)
      for (int column = 0; column < columns; ++column) {
        const auto [thread, i] = place(row, column);
        float sum = accumulate ? sums[thread][i] : 0.f;
        for (int k = 0; k < 16; ++k) sum += l[row][k] * r[k][column];
        sums[thread][i] = sum;
      }
  }
};

// The products that one warpgroup has under way: groups closed by a commit, and the group still open.
struct Products {
  std::vector<std::vector<Product>> groups{1};
  std::map<float*, std::vector<float>> kept; // what accumulators held before, while they hold NaN
  Product coming;
  bool begun = false;

  void add(const Product& p) {
    if (!begun) fault("products without wgmma.fence before them");
    groups.back().push_back(p);
    for (float* sums : p.sums)
      if (!kept.count(sums)) {
        kept[sums] = std::vector<float>(sums, sums + p.columns / 2);
        std::fill_n(sums, p.columns / 2, std::numeric_limits<float>::quiet_NaN());
      }
  }
  void commit() {
    groups.emplace_back();
    begun = false;
  }
  void wait(size_t pending) {
    while (groups.size() > pending + 1) {
      for (const Product& p : groups.front()) finish(p);
      groups.erase(groups.begin());
    }
  }
  void finish(const Product& p) {
    for (float* sums : p.sums)
      if (const auto found = kept.find(sums); found != kept.end()) {
        std::copy(found->second.begin(), found->second.end(), sums);
        kept.erase(found);
      }
    p.run();
  }
};

} // namespace jepa
