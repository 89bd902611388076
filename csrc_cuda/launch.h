// Kernel launches, in one place.
#pragma once

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "check.h"
#include "device.h"

namespace bnb {

constexpr int64_t kMaxGrid = 0x7fffffff;

// The number of blocks for that much work; kernels loop over what is more than the largest grid.
inline int64_t grid_of(int64_t blocks) { return std::min(blocks, kMaxGrid); }

// What all arguments of a launch may take, on every device.
constexpr size_t kArgumentBytes = 4096;

// Devices give a block more shared memory than this only to kernels that ask for it.
constexpr size_t kSharedBytesUnasked = 48 * 1024;

// Asks for it on the current device, unless the kernel has been given as much there before.
inline void allow_shared_bytes(const char* name, const void* kernel, size_t bytes) {
  if (bytes <= kSharedBytesUnasked) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        name);
  most = bytes;
}

// Runs kernel(arguments...) on a stream; nothing is launched where there are no blocks.
//
// Raises std::runtime_error with the kernel's name where the launch fails.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, Stream stream,
            size_t shared_bytes, Arguments... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= kArgumentBytes);
  if (blocks == 0) return;
  const dim3 grid(static_cast<unsigned>(grid_of(blocks)));
  const dim3 block(static_cast<unsigned>(threads));
  const auto queue = static_cast<cudaStream_t>(stream);
  allow_shared_bytes(name, reinterpret_cast<const void*>(kernel), shared_bytes);
#if defined(BNB_SIMULATED)
  simulate(name, kernel, grid, block, shared_bytes, queue, static_cast<Parameters>(arguments)...);
#else
  kernel<<<grid, block, shared_bytes, queue>>>(static_cast<Parameters>(arguments)...);
#endif
  check(cudaGetLastError(), name);
}

}  // namespace bnb
