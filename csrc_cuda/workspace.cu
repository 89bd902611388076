// A pool of memory for each device.
#include "workspace.h"

#include <mutex>
#include <vector>

namespace bnb {
namespace {

cudaMemPool_t make_pool(int device) {
  cudaMemPoolProps properties = {};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  cudaMemPool_t pool;
  check(cudaMemPoolCreate(&pool, &properties), "cudaMemPoolCreate");
  uint64_t keep_all = UINT64_MAX;
  check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep_all), "cudaMemPoolSetAttribute");
  return pool;
}

// The pool of the current device, made when first asked for. It lives as long as the process: destroying it
// after the runtime has gone would be an error.
cudaMemPool_t current_pool() {
  static std::mutex mutex;
  static std::vector<cudaMemPool_t> pools;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (pools.size() <= static_cast<size_t>(device)) pools.resize(device + 1);
  if (!pools[device]) pools[device] = make_pool(device);
  return pools[device];
}

}  // namespace

Workspace::Workspace(size_t bytes, Stream stream) : stream_(static_cast<cudaStream_t>(stream)) {
  if (bytes == 0) return;
  const cudaError_t error = cudaMallocFromPoolAsync(&data_, bytes, current_pool(), stream_);
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next launch would report it
  check(error, ("workspace of " + std::to_string(bytes) + " bytes").c_str());
}

Workspace::~Workspace() {
  if (data_) (void)cudaFreeAsync(data_, stream_);
}

}  // namespace bnb
