// The functions of csrc/common/hopper_host.cuh, for tests: blocks run here, one after another.
#pragma once
#include <Python.h>

#include "common/hopper.cuh"

namespace jepa {

struct MapShape {
  void* data;
  uint64_t sizes[4], strides[3];
  int line, rows;
};

// The device to launch on. Choosing it is what gives a thread a context.
inline int chosen = 0;
struct OnDevice {
  OnDevice(const char*, int) { ++chosen; }
  ~OnDevice() { --chosen; }
  OnDevice(const OnDevice&) = delete;
};

inline TensorMap tensor_map(const char*, const MapShape& s) {
  if (!chosen) fault("a tensor map before its device is chosen");
  TensorMap map{static_cast<const uint8_t*>(s.data), {}, {2}, s.line, s.rows};
  if (reinterpret_cast<uintptr_t>(s.data) % 16)
    fault("a tensor map of an address that is not a multiple of 16");
  for (int d = 0; d < 4; ++d) {
    map.sizes[d] = static_cast<int64_t>(s.sizes[d]);
    if (s.sizes[d] == 0) fault("a tensor map with an empty dimension");
    if (d == 0) continue;
    if (s.strides[d - 1] % 16 || s.strides[d - 1] >= uint64_t(1) << 40)
      fault("a stride that no tensor map takes");
    map.strides[d] = static_cast<int64_t>(s.strides[d - 1]);
  }
  return map;
}

inline int multiprocessors(const char*, int) { return 1; }

struct Grid {
  int64_t blocks;
  int threads, shared_bytes, device;
  void* stream;
};

inline int64_t launches = 0; // since they were last read

template <class Args> void launch(const char*, void (*kernel)(Args), const Grid& grid, const Args& args) {
  if (grid.shared_bytes > 227 * 1024) fault("more shared memory than a block can have");
  if (PyGILState_Check()) fault("a launch, which may wait for the device, with Python's lock held");
  ++launches;
  for (int64_t i = 0; i < grid.blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(i);
    hopper = {};
    Block(grid.threads, grid.shared_bytes).run([&] { kernel(args); });
    for (const auto& [address, barrier] : hopper.barriers)
      if (barrier.expected) fault("a block ended before its copies arrived");
  }
}

} // namespace jepa
