#include "../csrc_shared/c_api.h"

#include <cuda_runtime.h>

#include "check.h"

namespace bnb {

// Waits for the stream: the codebook may have been copied to the device on it.
float first_entry(const float* code, Stream stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  float entry = 0;
  check(cudaMemcpyAsync(&entry, code, sizeof entry, cudaMemcpyDeviceToHost, queue), "reading a codebook");
  check(cudaStreamSynchronize(queue), "reading a codebook");
  return entry;
}

}  // namespace bnb
