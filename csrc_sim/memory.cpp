// The device's memory: on the host's heap, each allocation exactly as long as it was asked for.
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "runtime.h"

struct SimulatedMemoryPool {
  std::map<cudaMemPoolAttr, uint64_t> attributes;
  size_t allocations = 0;
};

namespace bnb::simulator {
namespace {

constexpr size_t kAlignment = 256;  // as cudaMalloc gives

struct Allocation {
  size_t bytes;
  SimulatedMemoryPool* pool;
};

std::mutex mutex;
std::map<void*, Allocation>& allocations() {
  static auto* all = new std::map<void*, Allocation>;
  return *all;
}

SimulatedMemoryPool& default_pool() {
  static auto* pool = new SimulatedMemoryPool;
  return *pool;
}

size_t host_bytes(int pages) {
  return static_cast<size_t>(sysconf(pages)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

cudaError_t allocate(void** data, size_t bytes, SimulatedMemoryPool* pool) {
  if (!data) return keep_error(cudaErrorInvalidValue);
  *data = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (bytes > host_bytes(_SC_AVPHYS_PAGES) || posix_memalign(data, kAlignment, bytes) != 0)
    return keep_error(cudaErrorMemoryAllocation);
  std::memset(*data, 0xff, bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  allocations()[*data] = {bytes, pool};
  if (pool) ++pool->allocations;
  return cudaSuccess;
}

cudaError_t release(void* data) {
  if (!data) return cudaSuccess;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = allocations().find(data);
    if (found == allocations().end()) return keep_error(cudaErrorInvalidValue);
    if (found->second.pool) --found->second.pool->allocations;
    allocations().erase(found);
  }
  std::free(data);
  return cudaSuccess;
}

cudaError_t valid(bool condition) { return keep_error(condition ? cudaSuccess : cudaErrorInvalidValue); }

}  // namespace
}  // namespace bnb::simulator

using bnb::simulator::allocate;
using bnb::simulator::allocating;
using bnb::simulator::default_pool;
using bnb::simulator::release;
using bnb::simulator::valid;
using bnb::simulator::waiting;

cudaError_t cudaMalloc(void** data, size_t bytes) {
  const cudaError_t error = allocating();
  return error ? error : allocate(data, bytes, nullptr);
}
cudaError_t cudaFree(void* data) {
  const cudaError_t error = waiting();
  return error ? error : release(data);
}
cudaError_t cudaMallocAsync(void** data, size_t bytes, cudaStream_t) {
  return allocate(data, bytes, &default_pool());
}
cudaError_t cudaFreeAsync(void* data, cudaStream_t) { return release(data); }
cudaError_t cudaMallocFromPoolAsync(void** data, size_t bytes, cudaMemPool_t pool, cudaStream_t) {
  return pool ? allocate(data, bytes, pool) : valid(false);
}
cudaError_t cudaMallocManaged(void** data, size_t bytes, unsigned) {
  return bytes ? cudaMalloc(data, bytes) : valid(false);
}
cudaError_t cudaMallocHost(void** data, size_t bytes) { return allocate(data, bytes, nullptr); }
cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) { return allocate(data, bytes, nullptr); }
cudaError_t cudaFreeHost(void* data) { return release(data); }

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  if (!free_bytes || !total_bytes) return valid(false);
  *free_bytes = bnb::simulator::host_bytes(_SC_AVPHYS_PAGES);
  *total_bytes = bnb::simulator::host_bytes(_SC_PHYS_PAGES);
  return cudaSuccess;
}
cudaError_t cudaMemPrefetchAsync(const void* data, size_t, int device, cudaStream_t) {
  return valid(data && (device == 0 || device == cudaCpuDeviceId));
}
cudaError_t cudaMemAdvise(const void* data, size_t, cudaMemoryAdvise, int device) {
  return valid(data && (device == 0 || device == cudaCpuDeviceId));
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes == 0) return cudaSuccess;
  if (!to || !from) return valid(false);
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t error = waiting();
  return error ? error : cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
cudaError_t cudaMemsetAsync(void* data, int byte, size_t bytes, cudaStream_t) {
  if (bytes == 0) return cudaSuccess;
  if (!data) return valid(false);
  std::memset(data, byte, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* data, int byte, size_t bytes) {
  const cudaError_t error = waiting();
  return error ? error : cudaMemsetAsync(data, byte, bytes, nullptr);
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps* properties) {
  if (!pool || !properties || properties->allocType != cudaMemAllocationTypePinned ||
      properties->location.type != cudaMemLocationTypeDevice || properties->location.id != 0)
    return valid(false);
  if (const cudaError_t error = allocating()) return error;
  *pool = new SimulatedMemoryPool;
  return cudaSuccess;
}
cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) {
  if (!pool || pool->allocations != 0) return valid(false);
  delete pool;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value) {
  if (!pool || !value) return valid(false);
  uint64_t& kept = pool->attributes[attribute];
  const bool is_flag = attribute <= cudaMemPoolReuseAllowInternalDependencies;
  std::memcpy(&kept, value, is_flag ? sizeof(int) : sizeof(uint64_t));
  return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value) {
  if (!pool || !value) return valid(false);
  const bool is_flag = attribute <= cudaMemPoolReuseAllowInternalDependencies;
  std::memcpy(value, &pool->attributes[attribute], is_flag ? sizeof(int) : sizeof(uint64_t));
  return cudaSuccess;
}
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t) { return valid(pool != nullptr); }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
  if (device != 0) return bnb::simulator::keep_error(cudaErrorInvalidDevice);
  if (!pool) return valid(false);
  *pool = &default_pool();
  return cudaSuccess;
}
