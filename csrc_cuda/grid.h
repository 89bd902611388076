// How many blocks a kernel that loops over its work is launched with.
#pragma once

#include "device_limits.h"
#include "launch.h"

namespace bnb {

// Blocks of that many threads: as many as there is work for, and no more than the current device can hold at
// once, so that what a block prepares serves for all of its work.
inline int64_t resident_grid(int64_t work, int threads) {
  const DeviceLimits limits = device_limits();
  return std::min<int64_t>(work,
                           int64_t{limits.multiprocessors} * (limits.threads_per_multiprocessor / threads));
}

}  // namespace bnb
