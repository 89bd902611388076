// The words that CUDA and HIP add to C++: qualifiers, grid and block indices, small vectors.
#pragma once

#include <cstddef>
#include <cstdint>

#define BNB_SIMULATED 1

#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// One copy for each OS thread, as an OS thread runs one block at a time; refilled before each block.
#define __shared__ static thread_local

// name1 to name4 of an element type, and make_name1 to make_name4; pairs and fours are aligned for one
// access.
#define BNB_SIMULATOR_VECTORS(T, name, alignment2, alignment4)       \
  struct name##1 { T x; };                                           \
  struct alignas(alignment2) name##2 { T x, y; };                    \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(alignment4) name##4 { T x, y, z, w; };              \
  inline name##1 make_##name##1(T x) { return {x}; }                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

BNB_SIMULATOR_VECTORS(signed char, char, 2, 4)
BNB_SIMULATOR_VECTORS(unsigned char, uchar, 2, 4)
BNB_SIMULATOR_VECTORS(short, short, 4, 8)
BNB_SIMULATOR_VECTORS(unsigned short, ushort, 4, 8)
BNB_SIMULATOR_VECTORS(int, int, 8, 16)
BNB_SIMULATOR_VECTORS(unsigned, uint, 8, 16)
BNB_SIMULATOR_VECTORS(long long, longlong, 16, 16)
BNB_SIMULATOR_VECTORS(unsigned long long, ulonglong, 16, 16)
BNB_SIMULATOR_VECTORS(float, float, 8, 16)
BNB_SIMULATOR_VECTORS(double, double, 16, 16)

#undef BNB_SIMULATOR_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  operator uint3() const { return {x, y, z}; }
};

// Where the running thread of a kernel is. (__thread: no constructor runs at an access.)
extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;
extern int warpSize;
