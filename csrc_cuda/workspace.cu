// A pool of memory for each device.
#include "workspace.h"

#include <mutex>
#include <vector>

namespace bnb {
namespace {

// What a pool keeps between calls, enough for all partial sums and for an int8 product of 2048 x 8192. More
// goes back to the driver at the next synchronization, as torch could not reclaim it.
constexpr uint64_t kKeptBytes = 64 << 20;

// Lets this thread make calls that are otherwise refused while it captures a graph: what they do is no part
// of the graph.
class OutsideCapture {
 public:
  OutsideCapture() { exchange(); }
  ~OutsideCapture() { exchange(); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  void exchange() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }

  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

cudaMemPool_t make_pool(int device) {
  const OutsideCapture outside;
  cudaMemPoolProps properties = {};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  cudaMemPool_t pool;
  check(cudaMemPoolCreate(&pool, &properties), "cudaMemPoolCreate");
  uint64_t kept = kKeptBytes;
  check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept), "cudaMemPoolSetAttribute");
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
  check(cudaMallocFromPoolAsync(&data_, bytes, current_pool(), stream_),
        ("workspace of " + std::to_string(bytes) + " bytes").c_str());
}

Workspace::~Workspace() {
  if (data_ && cudaFreeAsync(data_, stream_) != cudaSuccess) (void)cudaGetLastError();
}

}  // namespace bnb
