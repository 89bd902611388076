// Products of small tiles by a warp: on tensor cores where the chip has them for the type, else by shuffles.
//
// The fragments are those of NVIDIA's mma instructions. With g = lane / 4 and t = lane % 4, a lane holds of
// A[16, k] rows g and g + 8, of B[k, 8] column g, and of C[16, 8] rows g and g + 8 at columns 2t and 2t + 1.
// A register holds 32 bits along k: a[0] and a[1] of the two rows, a[2] and a[3] of the same rows further on;
// b[0] goes with the first two, b[1] with the others. So the order of k is the caller's.
#pragma once

#include <cstring>
#include <type_traits>

#include "device_limits.h"

namespace bnb {

// Whether the current device multiplies T on tensor cores here. What it does by shuffles is right, and slow:
// such products are better off with plain multiply-adds. The simulator runs them to test them.
#if defined(__HIP_PLATFORM_AMD__) && !defined(BNB_SIMULATED)
constexpr bool kMayHaveMma = false;  // the place for MFMA and WMMA is in mma_16x8x16
#else
constexpr bool kMayHaveMma = true;
#endif
template <class T>
bool has_mma() {
#if defined(BNB_SIMULATED)
  return true;
#else
  return kMayHaveMma && device_limits().compute_capability >= (std::is_same_v<T, __half> ? 75 : 80);
#endif
}

constexpr int kMmaRows = 16;
constexpr int kMmaColumns = 8;
constexpr int kQuad = 4;  // lanes that share a row

// c += the dot product of what two registers hold.
template <class T>
__device__ inline void add_products(float& c, uint32_t a, uint32_t b) {
  struct Pair {
    T low, high;
  };
  Pair x, y;
  memcpy(&x, &a, sizeof(a));
  memcpy(&y, &b, sizeof(b));
  c = fmaf(to_float(x.low), to_float(y.low), c);
  c = fmaf(to_float(x.high), to_float(y.high), c);
}
template <class T>
__device__ inline void add_products(int32_t& c, uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  c = __dp4a(static_cast<int>(a), static_cast<int>(b), c);
#else
#pragma unroll
  for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
#endif
}

__device__ inline uint64_t pair_of(uint32_t low, uint32_t high) { return low | uint64_t{high} << 32; }

template <class T, class C>
__device__ inline void mma_by_shuffles(C (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int quad = lane() / kQuad * kQuad, column = lane() % kQuad * 2;
  const uint64_t rows[2] = {pair_of(a[0], a[1]), pair_of(a[2], a[3])};
  const uint64_t columns = pair_of(b[0], b[1]);
#pragma unroll 1
  for (int t = 0; t < kQuad; t++) {
    uint64_t x[2], y[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      x[i] = shuffle(rows[i], quad + t);
      y[i] = shuffle(columns, (column + i) * kQuad + t);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const auto of_column = static_cast<uint32_t>(y[j] >> (32 * half));
        add_products<T>(c[j], static_cast<uint32_t>(x[half]), of_column);
        add_products<T>(c[2 + j], static_cast<uint32_t>(x[half] >> 32), of_column);
      }
    }
  }
}

// c += A[16, 16] B[16, 8] in f32, for half and bfloat16.
template <class T>
__device__ inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, __half>) {
#pragma unroll
    for (int half = 0; half < 2; half++)
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  } else {
    __trap();  // has_mma<T>() is false
  }
#else
  mma_by_shuffles<T>(c, a, b);
#endif
}

// c += A[16, 32] B[32, 8] in i32, for i8.
__device__ inline void mma_16x8x32(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__)
  // m8n8k16: rows 0 to 7 and 8 to 15, and the two halves of k, one by one.
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int rows = 0; rows < 2; rows++)
      asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                   : "+r"(c[2 * rows]), "+r"(c[2 * rows + 1])
                   : "r"(a[2 * half + rows]), "r"(b[half]));
  }
#else
  mma_by_shuffles<int8_t>(c, a, b);
#endif
}

}  // namespace bnb
