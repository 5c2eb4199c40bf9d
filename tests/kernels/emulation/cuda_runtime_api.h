// In place of CUDA's header on the include path: a machine's devices, as a test makes them up.
#pragma once
#include <vector>

#define CUDART_VERSION 13020

inline std::vector<int> capabilities; // of each device, 10 * major + minor
inline int driver_version = CUDART_VERSION;

enum cudaError_t { cudaSuccess, cudaErrorInsufficientDriver = 35 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };

inline const char* cudaGetErrorString(cudaError_t) { return "CUDA driver version is insufficient"; }
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver_version;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(capabilities.size());
  return driver_version / 1000 < CUDART_VERSION / 1000 ? cudaErrorInsufficientDriver : cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  const int capability = capabilities[device];
  *value = which == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
  return cudaSuccess;
}
