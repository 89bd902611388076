// The same runtime under HIP's names.
#include <hip/hip_bf16.h>
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>

#include "harness.h"

#if !defined(__HIP_PLATFORM_AMD__)
#error "HIP's headers say which platform they are for"
#endif

namespace {

__global__ void add(const __half* x, const __hip_bfloat16* y, float* sum) {
  sum[threadIdx.x] = __half2float(x[threadIdx.x]) + __bfloat162float(y[threadIdx.x]);
}

void memory_and_kernels() {
  __half* x = nullptr;
  __hip_bfloat16* y = nullptr;
  float* sum = nullptr;
  REQUIRE(hipMalloc(reinterpret_cast<void**>(&x), 64) == hipSuccess);
  REQUIRE(hipMallocAsync(reinterpret_cast<void**>(&y), 64, hipStream_t{}) == hipSuccess);
  REQUIRE(hipMallocManaged(reinterpret_cast<void**>(&sum), 128) == hipSuccess);
  for (int i = 0; i < 32; ++i) {
    x[i] = __float2half(static_cast<float>(i));
    y[i] = __float2bfloat16(0.5f);
  }
  LAUNCH(add, 1, 32, 0, x, y, sum);
  for (int i = 0; i < 32; ++i) REQUIRE(sum[i] == static_cast<float>(i) + 0.5f);
  REQUIRE(hipFree(x) == hipSuccess && hipFreeAsync(y, nullptr) == hipSuccess && hipFree(sum) == hipSuccess);
}

void the_device() {
  int value = 0;
  REQUIRE(hipGetDeviceCount(&value) == hipSuccess && value == 1);
  REQUIRE(hipDeviceGetAttribute(&value, hipDeviceAttributeWarpSize, 0) == hipSuccess && value == warpSize);
  REQUIRE(hipDeviceGetAttribute(&value, hipDeviceAttributeSharedMemPerBlockOptin, 0) == hipSuccess);
  REQUIRE(value == 64 * 1024);
  REQUIRE(hipSetDevice(1) == hipErrorInvalidDevice && hipGetLastError() == hipErrorInvalidDevice);
  REQUIRE(hipGetErrorString(hipGetLastError()) == std::string("no error"));
}

__global__ void do_nothing(int*) {}

hipError_t error_with_shared_memory(size_t bytes) {
  bnb::simulate("do_nothing", do_nothing, 1, 32, bytes, nullptr, nullptr);
  return hipGetLastError();
}

void shared_memory_as_amd_has_it() {
  REQUIRE(error_with_shared_memory(64 * 1024) == hipSuccess);
  REQUIRE(error_with_shared_memory(64 * 1024 + 1) == hipErrorInvalidValue);
}

}  // namespace

const Cases kHip{CASE(memory_and_kernels), CASE(the_device), CASE(shared_memory_as_amd_has_it)};
