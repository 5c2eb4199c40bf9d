// What a launch of a Hopper kernel needs on the host: tensor maps, shared memory, a stream.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>
#include <mutex>
#include <stdexcept>
#include <string>

#include "common/hopper.cuh"

namespace jepa {

inline void check_launch(const char* op, bool done, const std::string& why) {
  if (done) return;
  throw std::runtime_error(std::string(op) + ": the CUDA launch must succeed, got " + why +
                           "; rerun with CUDA_LAUNCH_BLOCKING=1 to find the cause");
}
inline void check_launch(const char* op, cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError(); // told here: a later launch must not be taken for its cause
  check_launch(op, status == cudaSuccess, cudaGetErrorString(status));
}

// The driver's function, found at run time: the extension must load where no driver is.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder(const char* op) {
  static void* const found = [op] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult state;
#if CUDART_VERSION >= 12050
    check_launch(op, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000,
                                                      cudaEnableDefault, &state));
#else
    check_launch(op, cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &address, cudaEnableDefault, &state));
#endif
    check_launch(op, address, "a driver without cuTensorMapEncodeTiled");
    return address;
  }();
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

// A tensor of 2-byte elements, innermost dimension first; strides, in bytes, of the other dimensions. A box
// holds `rows` rows of the second dimension, each as a line of 128, 64 or 32 bytes in the swizzle of that
// name.
struct MapShape {
  void* data;
  uint64_t sizes[4], strides[3];
  int line, rows;
};

inline TensorMap tensor_map(const char* op, const MapShape& s) {
  TensorMap map;
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(s.line / 2), static_cast<cuuint32_t>(s.rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUtensorMapSwizzle swizzle = s.line == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : s.line == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                    : CU_TENSOR_MAP_SWIZZLE_32B;
  const CUresult status =
      tensor_map_encoder(op)(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, s.data, s.sizes, s.strides, box, steps,
                             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check_launch(op, status == CUDA_SUCCESS, "no tensor map (error " + std::to_string(status) + ")");
  return map;
}

// The device to launch on, and the one before it afterwards.
class OnDevice {
public:
  OnDevice(const char* op, int device) : op_(op) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(device));
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  void check(cudaError_t status) const { check_launch(op_, status); }

private:
  const char* op_;
  int before_ = 0;
};

inline int multiprocessors(const char* op, int device) {
  int count = 0;
  check_launch(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

struct Grid {
  int64_t blocks;
  int threads, shared_bytes, device;
  void* stream;
};

// Allows the kernel so much shared memory on this device. Never less than before: launches by other threads,
// and those in graphs that were captured, go by it too.
template <class Args> void allow(const OnDevice& on, void (*kernel)(Args), int shared_bytes) {
  static std::mutex one;
  const std::lock_guard<std::mutex> own(one);
  cudaFuncAttributes now;
  on.check(cudaFuncGetAttributes(&now, kernel));
  if (now.maxDynamicSharedSizeBytes >= shared_bytes) return;
  on.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
}

template <class Args> void launch(const char* op, void (*kernel)(Args), const Grid& grid, const Args& args) {
  if (grid.blocks == 0) return;
  const OnDevice on(op, grid.device);
  if (grid.shared_bytes > 0) allow(on, kernel, grid.shared_bytes);
  kernel<<<static_cast<unsigned>(grid.blocks), grid.threads, grid.shared_bytes,
           static_cast<cudaStream_t>(grid.stream)>>>(args);
  on.check(cudaGetLastError());
}

} // namespace jepa
