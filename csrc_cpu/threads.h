// Threads from torch's own OpenMP runtime, which Python names at import; none is linked, so a process never
// holds two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace bnb {

// Takes the OpenMP entry points from the runtime that the library at `path` (libtorch_cpu.so) uses.
// Throws std::runtime_error if they are not found. Until it is called, everything runs on one thread.
void set_openmp(const std::string& path);

// The file that the entry points were found in, null before set_openmp.
const char* openmp_path();

using RangeBody = void (*)(void* context, int64_t begin, int64_t end);

// Calls body on contiguous parts of [0, n), each at least `grain` long where that is possible.
void parallel_range(int64_t n, int64_t grain, RangeBody body, void* context);

}  // namespace bnb
