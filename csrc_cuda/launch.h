// Kernel launches, in one place.
#pragma once

#include <algorithm>

#include "check.h"
#include "device.h"

namespace bnb {

constexpr int64_t kMaxGrid = 0x7fffffff;

// The number of blocks for that much work; kernels loop over what is more than the largest grid.
inline int64_t grid_of(int64_t blocks) { return std::min(blocks, kMaxGrid); }

// Devices give a block more shared memory than this only to kernels that ask for it.
constexpr size_t kSharedBytesUnasked = 48 * 1024;

// Runs kernel(arguments...) on a stream; nothing is launched where there are no blocks.
//
// Raises std::runtime_error with the kernel's name where the launch fails.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, Stream stream,
            size_t shared_bytes, Arguments... arguments) {
  if (blocks == 0) return;
  const dim3 grid(static_cast<unsigned>(grid_of(blocks)));
  const dim3 block(static_cast<unsigned>(threads));
  const auto queue = static_cast<cudaStream_t>(stream);
  if (shared_bytes > kSharedBytesUnasked)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          name);
#if defined(BNB_SIMULATED)
  simulate(name, kernel, grid, block, shared_bytes, queue, static_cast<Parameters>(arguments)...);
#else
  kernel<<<grid, block, shared_bytes, queue>>>(static_cast<Parameters>(arguments)...);
#endif
  check(cudaGetLastError(), name);
}

}  // namespace bnb
