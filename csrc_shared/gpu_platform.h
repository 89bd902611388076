// Where NVIDIA's and AMD's runtimes differ by more than names: the one file that knows both. hipify leaves it
// alone.
#pragma once

#if defined(__HIP_PLATFORM_AMD__)
#include <hip/hip_runtime.h>
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace bnb {

// The value of the lane of the same `width` lanes whose index differs by `lane_mask`; all of them call it.
template <int width, class T>
__device__ inline T shuffle_xor_lanes(T value, int lane_mask) {
#if defined(__HIP_PLATFORM_AMD__)
  return __shfl_xor(value, lane_mask, width);
#else
  return __shfl_xor_sync(0xffffffffu, value, lane_mask, width);
#endif
}

// The value of lane `source` of the same `width` lanes; all of them call it.
template <int width, class T>
__device__ inline T shuffle_lanes(T value, int source) {
#if defined(__HIP_PLATFORM_AMD__)
  return __shfl(value, source, width);
#else
  return __shfl_sync(0xffffffffu, value, source, width);
#endif
}

// Waits for the other lanes of the warp, and shows it what they have written. A template, as host compilers
// read this file and know no __syncwarp.
template <class Mask = uint32_t>
__device__ inline void sync_warp([[maybe_unused]] Mask lanes = 0xffffffffu) {
#if defined(__HIP__)
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
  __builtin_amdgcn_wave_barrier();
#elif !defined(__HIP_PLATFORM_AMD__) || defined(BNB_SIMULATED)
  __syncwarp(lanes);
#endif
}

// A store that other threads may be making of the same value.
__device__ inline void store_relaxed(uint8_t* address, uint8_t value) {
#if defined(__CUDA_ARCH__)
  *static_cast<volatile uint8_t*>(address) = value;
#else
  __atomic_store_n(address, value, __ATOMIC_RELAXED);
#endif
}

// Whether a device's compute capability is NVIDIA's.
#if defined(__HIP_PLATFORM_AMD__)
constexpr bool kIsNvidia = false;
#else
constexpr bool kIsNvidia = true;
#endif

// Whether this build has code with the instructions that only Hopper has, or simulates it. BNB_HOPPER is
// defined where that code is compiled: for the target 90a, which toolchain.py names where 90 is asked for.
#if defined(__HIP_PLATFORM_AMD__)
constexpr bool kBuiltForHopper = false;
#elif defined(__CUDACC_VER_MAJOR__)
constexpr bool is_built_for(int arch) {
  for (const int built : {__CUDA_ARCH_LIST__})
    if (built == arch) return true;
  return false;
}
constexpr bool kBuiltForHopper = __CUDACC_VER_MAJOR__ >= 12 && is_built_for(900);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BNB_HOPPER 1
#endif
#else
constexpr bool kBuiltForHopper = true;
#endif

#if defined(__HIP_PLATFORM_AMD__)
using GpuError = hipError_t;
using GpuStream = hipStream_t;
#else
using GpuError = cudaError_t;
using GpuStream = cudaStream_t;
#endif

// What there is not of a runtime to call, or null; and the file of the runtime, or null where it is a part of
// the module. NVIDIA's is one, AMD's is looked for by csrc_hip/runtime.cpp.
#if defined(__HIP_PLATFORM_AMD__)
const char* missing_runtime();
const char* runtime_path();
#else
inline const char* missing_runtime() { return nullptr; }
inline const char* runtime_path() { return nullptr; }
#endif

// Starts to move managed memory to a device, or to the host. CUDA 13 names places otherwise than before.
inline GpuError prefetch_pages(const void* address, size_t bytes, bool to_host, int device,
                               GpuStream stream) {
#if defined(__HIP_PLATFORM_AMD__)
  return hipMemPrefetchAsync(address, bytes, to_host ? hipCpuDeviceId : device, stream);
#elif CUDART_VERSION >= 13000
  const cudaMemLocationType type = to_host ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice;
  return cudaMemPrefetchAsync(address, bytes, cudaMemLocation{type, to_host ? 0 : device}, 0, stream);
#else
  return cudaMemPrefetchAsync(address, bytes, to_host ? cudaCpuDeviceId : device, stream);
#endif
}

}  // namespace bnb
