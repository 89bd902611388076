// The runtime's errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace bnb {

// Raises what the runtime says went wrong, with the name of what was being done. The runtime also keeps a
// call's error, and the next launch would report it as its own.
inline void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(error));
}

}  // namespace bnb
