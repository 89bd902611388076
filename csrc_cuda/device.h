// What every file of GPU code starts from: the runtime, half and bfloat16, and what a warp can do together.
//
// The same sources are compiled for NVIDIA by nvcc, for AMD after hipify, and for the host by the simulator
// (csrc_sim), whose headers bear the same names. Warps here are logical: 32 lanes, whatever the hardware's
// wave.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../csrc_shared/gpu_platform.h"
#include "../csrc_shared/host_device.h"
#include "../csrc_shared/kernels.h"

namespace bnb {

constexpr int kWarp = 32;

// This thread's lane in its warp, and its warp in the block; blocks are one-dimensional.
__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

// The value of the lane whose index differs by `lane_mask`; every lane of the warp calls it.
template <class T>
__device__ inline T shuffle_xor(T value, int lane_mask) {
  return shuffle_xor_lanes<kWarp>(value, lane_mask);
}

// The value of lane `source`; every lane of the warp calls it.
template <class T>
__device__ inline T shuffle(T value, int source) {
  return shuffle_lanes<kWarp>(value, source);
}

// A combination of the values of `width` neighbouring lanes (a power of two), the same in each of them.
template <int width = kWarp, class T, class Combine>
__device__ inline T warp_reduce(T value, Combine combine) {
  for (int distance = width / 2; distance > 0; distance /= 2)
    value = combine(value, shuffle_xor(value, distance));
  return value;
}
template <int width = kWarp, class T>
__device__ inline T warp_sum(T value) {
  return warp_reduce<width>(value, [](T a, T b) { return a + b; });
}
template <int width = kWarp, class T>
__device__ inline T warp_max(T value) {
  return warp_reduce<width>(value, [](T a, T b) { return a > b ? a : b; });
}
__device__ inline int32_t warp_max(int32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, value);
#else
  return warp_max<kWarp>(value);
#endif
}

// The value, of which the compiler is not to know that it has been the same before: so that what is computed
// from it takes no register until then.
__device__ inline uint32_t computed_late(uint32_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(value));
#endif
  return value;
}
__device__ inline int late_lane() { return static_cast<int>(computed_late(threadIdx.x) % kWarp); }
__device__ inline int late_warp() { return static_cast<int>(computed_late(threadIdx.x) / kWarp); }

// Shared memory whose size the launch gives, from a multiple of 1024 on.
template <class T>
__device__ inline T* dynamic_shared() {
#if defined(BNB_SIMULATED)
  return static_cast<T*>(simulated_dynamic_shared());
#else
  extern __shared__ __align__(1024) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#endif
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// A float rounded to T, to nearest even.
template <class T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16(value);
}

// `count` neighbouring values that move in one access of up to 16 bytes; the address is a multiple of their
// size.
template <class T, int count>
struct alignas(sizeof(T) * count) Pack {
  T values[count];
  __device__ T& operator[](int i) { return values[i]; }
  __device__ const T& operator[](int i) const { return values[i]; }
};

// Two values of 16 bits as one register.
template <class Pair>
__device__ inline uint32_t bits_of_pair(const Pair& pair) {
  static_assert(sizeof(Pair) == sizeof(uint32_t));
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

template <class T>
struct Type {
  using type = T;
};

// Calls f with the Type of the elements.
template <class F>
void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(Type<float>());
    case DType::f16:
      return f(Type<__half>());
    case DType::bf16:
      return f(Type<__nv_bfloat16>());
  }
}

BNB_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The exponent of a power of two.
inline int log2_of(int64_t power) {
  int exponent = 0;
  while (int64_t{1} << exponent < power) exponent++;
  return exponent;
}

}  // namespace bnb
