#include "managed_memory.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../csrc_shared/gpu_platform.h"
#include "check.h"

namespace bnb {
namespace {

struct Allocation {
  int device;
  size_t bytes;
};

std::mutex mutex;
std::map<uintptr_t, Allocation> allocations;

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

size_t bytes_in_use(int device) {
  size_t bytes = 0;
  for (const auto& entry : allocations)
    if (entry.second.device == device) bytes += entry.second.bytes;
  return bytes;
}

void require_paging(int device) {
  int pages = 0;
  check(cudaDeviceGetAttribute(&pages, cudaDevAttrConcurrentManagedAccess, device), "cudaDeviceGetAttribute");
  if (!pages)
    throw std::runtime_error(
        "device " + std::to_string(device) +
        " cannot page: its driver or system has no concurrent managed access; use the optimizers "
        "without paged state");
}

// What is in use can leave the device for the host, so that its room counts beside what is free.
void require_room(int device, size_t bytes) {
  size_t free_bytes = 0, total = 0;
  check(cudaMemGetInfo(&free_bytes, &total), "cudaMemGetInfo");
  const size_t in_use = bytes_in_use(device);
  if (bytes > std::min(free_bytes + in_use, total - std::min(total, in_use)))
    throw std::runtime_error("cannot allocate " + std::to_string(bytes) + " bytes of paged memory: device " +
                             std::to_string(device) + " has " + std::to_string(free_bytes) +
                             " bytes free of " + std::to_string(total) + ", and paged memory has " +
                             std::to_string(in_use) + " in use");
}

}  // namespace

uintptr_t allocate_managed(size_t bytes) {
  const int device = current_device();
  require_paging(device);
  const std::lock_guard<std::mutex> lock(mutex);
  require_room(device, bytes);
  void* data = nullptr;
  check(cudaMallocManaged(&data, bytes, cudaMemAttachGlobal), "cudaMallocManaged");
  std::memset(data, 0, bytes);
  const auto address = reinterpret_cast<uintptr_t>(data);
  allocations[address] = {device, bytes};
  return address;
}

void free_managed(uintptr_t address) {
  const std::lock_guard<std::mutex> lock(mutex);
  allocations.erase(address);
  check(cudaFree(reinterpret_cast<void*>(address)), "cudaFree");
}

void prefetch_managed(uintptr_t address, size_t bytes, bool to_host, Stream stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  check(prefetch_pages(reinterpret_cast<void*>(address), bytes, to_host, current_device(), queue),
        "prefetch_managed");
}

}  // namespace bnb
