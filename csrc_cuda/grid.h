// How many blocks a kernel that loops over its work is launched with.
#pragma once

#include "launch.h"

namespace bnb {

// Blocks of that many threads: as many as there is work for, and no more than the current device can hold at
// once, so that what a block prepares serves for all of its work.
inline int64_t resident_grid(int64_t work, int threads) {
  int device = 0, multiprocessors = 0, threads_each = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&threads_each, cudaDevAttrMaxThreadsPerMultiProcessor, device),
        "cudaDeviceGetAttribute");
  return std::min<int64_t>(work, int64_t{multiprocessors} * (threads_each / threads));
}

}  // namespace bnb
