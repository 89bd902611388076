// A HIP runtime that computes nothing: it keeps what is registered with it and tells of launches. With
// WITHOUT_POOLS it lacks what ROCm before 5.1 does.
#include <hip/hip_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <string>

namespace {

constexpr uint32_t kMagic = 0x48495046;  // "HIPF", by which a compiled file begins
constexpr char kTold[] = "dequantize_kernel";
constexpr int kToldArguments = 6;
constexpr int kShortArgument = 4;  // of 4 bytes; the others have 8

std::set<void**> binaries;
std::map<const void*, std::string> kernels;
std::string told;

struct {
  dim3 grid, block;
  size_t shared;
  hipStream_t stream;
} pushed;

void tell(uint64_t number) { told += std::to_string(number) + " "; }

}  // namespace

extern "C" {

int registered_binaries() { return static_cast<int>(binaries.size()); }
int registered_kernels() { return static_cast<int>(kernels.size()); }
// Of each launch the grid, the block, the bytes of shared memory, the stream and the kernel's arguments.
const char* launches() { return told.c_str(); }

void** __hipRegisterFatBinary(const void* data) {
  uint32_t magic;
  std::memcpy(&magic, data, sizeof(magic));
  return magic == kMagic ? *binaries.insert(reinterpret_cast<void**>(new char)).first : nullptr;
}

void __hipRegisterFunction(void** binary, const void* kernel, char*, const char* name, unsigned, void*, void*,
                           void*, void*, int*) {
  if (binaries.count(binary)) kernels[kernel] = name;
}

hipError_t __hipPushCallConfiguration(dim3 grid, dim3 block, size_t shared, hipStream_t stream) {
  pushed = {grid, block, shared, stream};
  return hipSuccess;
}

hipError_t __hipPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, hipStream_t* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *stream = pushed.stream;
  return hipSuccess;
}

hipError_t hipLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                           hipStream_t stream) {
  if (!kernels.count(kernel) || kernels[kernel].find(kTold) == std::string::npos)
    return hipErrorInvalidDeviceFunction;
  for (const uint32_t size : {grid.x, grid.y, grid.z, block.x, block.y, block.z}) tell(size);
  tell(shared);
  tell(reinterpret_cast<uintptr_t>(stream));
  for (int i = 0; i < kToldArguments; i++) {
    uint64_t value = 0;
    std::memcpy(&value, arguments[i], i == kShortArgument ? 4 : 8);
    tell(value);
  }
  return hipSuccess;
}

hipError_t hipDeviceGetAttribute(int* value, hipDeviceAttribute_t, int) {
  *value = 1024;
  return hipSuccess;
}
hipError_t hipDriverGetVersion(int* version) {
  *version = 60300000;
  return hipSuccess;
}
hipError_t hipRuntimeGetVersion(int* version) { return hipDriverGetVersion(version); }
hipError_t hipGetDevice(int* device) {
  *device = 0;
  return hipSuccess;
}
const char* hipGetErrorString(hipError_t) { return "an error of the stand-in's"; }
hipError_t hipGetLastError() { return hipSuccess; }

hipError_t hipFree(void*) { return hipErrorNotSupported; }
hipError_t hipFreeAsync(void*, hipStream_t) { return hipErrorNotSupported; }
hipError_t hipFuncSetAttribute(const void*, hipFuncAttribute, int) { return hipErrorNotSupported; }
hipError_t hipMallocManaged(void**, size_t, unsigned) { return hipErrorNotSupported; }
hipError_t hipMemGetInfo(size_t*, size_t*) { return hipErrorNotSupported; }
hipError_t hipMemPrefetchAsync(const void*, size_t, int, hipStream_t) { return hipErrorNotSupported; }
hipError_t hipMemsetAsync(void*, int, size_t, hipStream_t) { return hipErrorNotSupported; }
hipError_t hipThreadExchangeStreamCaptureMode(hipStreamCaptureMode*) { return hipErrorNotSupported; }
#if !defined(WITHOUT_POOLS)
hipError_t hipMallocFromPoolAsync(void**, size_t, hipMemPool_t, hipStream_t) { return hipErrorNotSupported; }
hipError_t hipMemPoolCreate(hipMemPool_t*, const hipMemPoolProps*) { return hipErrorNotSupported; }
hipError_t hipMemPoolSetAttribute(hipMemPool_t, hipMemPoolAttr, void*) { return hipErrorNotSupported; }
#endif
}
