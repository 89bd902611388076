// Memory that moves between the host and the GPU page by page, for paged optimizer state.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../csrc_shared/kernels.h"

namespace bnb {

// Zeroed managed memory for the current device, resident in host memory until it is used or prefetched.
//
// All of it together is limited to the device's memory, and each allocation to what the device can hold at
// once: what is free, and what other managed memory would leave. Raises std::runtime_error that says what was
// asked for, what is free and what is in use, or that the device cannot page.
uintptr_t allocate_managed(size_t bytes);
void free_managed(uintptr_t address);

// Starts to move it to the current device, or to the host, in the stream's order.
void prefetch_managed(uintptr_t address, size_t bytes, bool to_host, Stream stream);

}  // namespace bnb
