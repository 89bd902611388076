#include "runtime.h"

#include <chrono>
#include <map>
#include <mutex>
#include <utility>

#include "device/language.h"
#include "settings.h"

struct SimulatedStream {};
struct SimulatedEvent {
  std::chrono::steady_clock::time_point time;
  bool recorded = false;
};

namespace bnb::simulator {
namespace {

constexpr int kThreadsPerMultiprocessor = 2048;
constexpr size_t kSharedBytesPerMultiprocessor = 228 * 1024;
constexpr int kMultiprocessors = 4;

struct ErrorText {
  cudaError_t error;
  const char* name;
  const char* text;
};

constexpr ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidDevicePointer, "cudaErrorInvalidDevicePointer", "invalid device pointer"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources",
     "too many resources requested for launch"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
};

const ErrorText* find_error(cudaError_t error) {
  for (const ErrorText& entry : kErrors)
    if (entry.error == error) return &entry;
  return nullptr;
}

thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

std::mutex limits_mutex;
std::map<const void*, size_t> dynamic_shared_limits;

cudaError_t device_zero(int device) { return keep_error(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

template <class T>
cudaError_t store(T* place, T value) {
  if (!place) return keep_error(cudaErrorInvalidValue);
  *place = value;
  return cudaSuccess;
}

int attribute_value(cudaDeviceAttr attribute) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return kMaxThreads;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return kSharedBytes;
    case cudaDevAttrWarpSize:
      return warpSize;
    case cudaDevAttrMaxRegistersPerBlock:
      return 65536;
    case cudaDevAttrMultiProcessorCount:
      return kMultiprocessors;
    case cudaDevAttrL2CacheSize:
      return 1 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return kThreadsPerMultiprocessor;
    case cudaDevAttrComputeCapabilityMajor:
      return 9;
    case cudaDevAttrComputeCapabilityMinor:
      return 0;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return kSharedBytesPerMultiprocessor;
    case cudaDevAttrManagedMemory:
    case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrMemoryPoolsSupported:
      return 1;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return kMostSharedBytes;
    case simulatedAttributeSharedBytesOfAmd:
      return kSharedBytesOfAmd;
  }
  return -1;
}

}  // namespace

cudaError_t keep_error(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t waiting() { return keep_error(capturing() ? cudaErrorStreamCaptureUnsupported : cudaSuccess); }

cudaError_t allocating() { return capture_mode == cudaStreamCaptureModeRelaxed ? cudaSuccess : waiting(); }

cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > kMostSharedBytes) return keep_error(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(limits_mutex);
  dynamic_shared_limits[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

size_t dynamic_shared_limit(const void* kernel) {
  const std::lock_guard<std::mutex> lock(limits_mutex);
  const auto found = dynamic_shared_limits.find(kernel);
  return found == dynamic_shared_limits.end() ? kSharedBytes : found->second;
}

cudaError_t blocks_per_multiprocessor(int* blocks, int threads, size_t shared_bytes) {
  if (threads < 1 || static_cast<unsigned>(threads) > kMaxThreads) return keep_error(cudaErrorInvalidValue);
  int most = kThreadsPerMultiprocessor / threads;
  if (shared_bytes) {
    const auto fitting = static_cast<int>(kSharedBytesPerMultiprocessor / shared_bytes);
    most = fitting < most ? fitting : most;
  }
  return store(blocks, most);
}

}  // namespace bnb::simulator

using bnb::simulator::device_zero;
using bnb::simulator::keep_error;
using bnb::simulator::store;

const char* cudaGetErrorName(cudaError_t error) {
  const auto* entry = bnb::simulator::find_error(error);
  return entry ? entry->name : "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
  const auto* entry = bnb::simulator::find_error(error);
  return entry ? entry->text : "unrecognized error code";
}
cudaError_t cudaPeekAtLastError() { return bnb::simulator::last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = bnb::simulator::last_error;
  bnb::simulator::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaGetDeviceCount(int* count) { return store(count, 1); }
cudaError_t cudaGetDevice(int* device) { return store(device, 0); }
cudaError_t cudaSetDevice(int device) { return device_zero(device); }
cudaError_t cudaDeviceSynchronize() { return bnb::simulator::waiting(); }
cudaError_t cudaDriverGetVersion(int* version) { return store(version, CUDART_VERSION); }
cudaError_t cudaRuntimeGetVersion(int* version) { return store(version, CUDART_VERSION); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return device_zero(device);
  const int known = bnb::simulator::attribute_value(attribute);
  return known < 0 ? keep_error(cudaErrorInvalidValue) : store(value, known);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return store(stream, stream ? new SimulatedStream : nullptr);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return bnb::simulator::waiting(); }
cudaError_t cudaStreamQuery(cudaStream_t) { return bnb::simulator::waiting(); }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return store(status,
               bnb::simulator::capturing() ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  if (!mode) return keep_error(cudaErrorInvalidValue);
  std::swap(*mode, bnb::simulator::capture_mode);
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return store(event, event ? new SimulatedEvent : nullptr);
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  if (!event) return keep_error(cudaErrorInvalidResourceHandle);
  event->time = std::chrono::steady_clock::now();
  event->recorded = true;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return bnb::simulator::waiting(); }
cudaError_t cudaEventQuery(cudaEvent_t) { return bnb::simulator::waiting(); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  if (!start || !end || !start->recorded || !end->recorded) return keep_error(cudaErrorInvalidResourceHandle);
  return store(milliseconds, std::chrono::duration<float, std::milli>(end->time - start->time).count());
}
