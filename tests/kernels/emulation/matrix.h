// Warpgroup matrix products, from the descriptors' bits. PTX ISA 9.7.15.5.1: "Register fragments", "Shared
// memory matrix layout", "Strides", "Matrix descriptor". Products are carried out where the warpgroup waits
// for them; until then their accumulators hold NaN, so that an early read shows.
#pragma once
#include <algorithm>
#include <array>
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

// Whether copies arrive at once, rather than as late as their barrier allows.
inline bool eager = false;

// Since the last look: multiply-adds of products, and bytes of tensors that copies fetched.
inline int64_t multiplied = 0, fetched = 0;

struct Product {
  std::array<float*, 128> sums{};
  std::array<std::array<uint32_t, 4>, 128> weights{};
  uint64_t a = 0, b = 0;
  int columns = 0;
  bool from_registers = false, by_columns = false, accumulate = false; // by_columns: a and b MN-major
  float (*widen)(uint16_t) = nullptr;

  void run() const;
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
