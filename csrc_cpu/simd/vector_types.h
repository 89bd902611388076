// Vectors of 32-bit lanes as the compiler's own vector types: + - * / & | ^ << >> come with them. What
// differs between instruction sets stands in portable.h, avx2.h, avx512.h and neon.h, which include this one.
//
// Everything here has internal linkage, and so must everything that a target includes: a function shared
// between translation units could be the copy compiled for the wrong machine.
#pragma once

#include <cstdint>

#define BNB_INLINE inline __attribute__((always_inline))
// Before a loop over vectors that are to stay in registers.
#if defined(__clang__)
#define BNB_UNROLL _Pragma("clang loop unroll(full)")
#else
#define BNB_UNROLL _Pragma("GCC unroll 16")
#endif

namespace bnb::BNB_TARGET {
namespace {

constexpr int kLanes = BNB_VECTOR_BYTES / 4;

typedef float F32 __attribute__((vector_size(BNB_VECTOR_BYTES)));
typedef int32_t I32 __attribute__((vector_size(BNB_VECTOR_BYTES)));
typedef int16_t I16 __attribute__((vector_size(BNB_VECTOR_BYTES)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// For instruction sets where kHasHalfTable.
template <class T>
class HalfTable;

BNB_INLINE I32 bits(F32 x) { return (I32)x; }
BNB_INLINE F32 from_bits(I32 x) { return (F32)x; }

BNB_INLINE F32 load(const float* p) {
  F32 x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
BNB_INLINE void store(float* p, F32 x) { __builtin_memcpy(p, &x, sizeof x); }

BNB_INLINE I32 load_words(const void* p) {
  I32 x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
BNB_INLINE I32 load(const int32_t* p) { return load_words(p); }

}  // namespace
}  // namespace bnb::BNB_TARGET
