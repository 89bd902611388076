// What the current device has, asked for once.
#pragma once

#include <array>
#include <mutex>

#include "../csrc_shared/gpu_platform.h"
#include "check.h"

namespace bnb {

struct DeviceLimits {
  int multiprocessors = 0;
  int threads_per_multiprocessor = 0;
  int compute_capability = 0;                                         // 10 * major + minor; NVIDIA's
  int shared_bytes_of_block = 0, shared_bytes_of_multiprocessor = 0;  // NVIDIA's
};

inline DeviceLimits query_device_limits(int device) {
  DeviceLimits limits;
  check(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&limits.threads_per_multiprocessor, cudaDevAttrMaxThreadsPerMultiProcessor,
                               device),
        "cudaDeviceGetAttribute");
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  limits.compute_capability = 10 * major + minor;
  if (!kIsNvidia) return limits;
  check(
      cudaDeviceGetAttribute(&limits.shared_bytes_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&limits.shared_bytes_of_multiprocessor,
                               cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
        "cudaDeviceGetAttribute");
  return limits;
}

inline DeviceLimits device_limits() {
  static std::mutex mutex;
  static std::array<DeviceLimits, 64> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device >= static_cast<int>(known.size())) return query_device_limits(device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (known[device].multiprocessors == 0) known[device] = query_device_limits(device);
  return known[device];
}

}  // namespace bnb
