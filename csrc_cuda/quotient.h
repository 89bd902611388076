// Quotients and roots of f32 to the last bit, with fewer instructions than the operators take: nvcc makes of
// those what stands here, and for each a branch to code for operands that are out of its range. Here the
// ranges of many operands are checked at once.
#pragma once

#include "elements.h"

namespace bnb {

#if defined(__HIP_PLATFORM_AMD__)
constexpr bool kHasQuickQuotients = false;
#else
constexpr bool kHasQuickQuotients = true;
#endif

// The approximations that nvcc's operators start from; of normal values.
__device__ inline float approximate_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}
__device__ inline float approximate_inverse_root(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return rsqrtf(x);
#endif
}

// Of a normal value below 2^126.
constexpr int32_t kEndOfQuickReciprocals = (127 + 126) << 23;
__device__ inline float quick_reciprocal(float x) {
  if (!kHasQuickQuotients) return 1.0f / x;
  const float near = approximate_reciprocal(x);
  return fmaf(near, fmaf(-x, near, 1.0f), near);
}

__device__ inline float quick_root(float v) {
  const float inverse = approximate_inverse_root(v);
  const float near = v * inverse;
  return fmaf(fmaf(-near, near, v), 0.5f * inverse, near);
}

__device__ inline float quick_quotient(float numerator, float divisor) {
  const float reciprocal = quick_reciprocal(divisor);
  const float quotient = numerator * reciprocal;
  return fmaf(reciprocal, fmaf(-divisor, quotient, numerator), quotient);
}

// Whether the quick ways are exact: quotients are normal, and so is all that the multiply-adds leave over.
template <int count>
__device__ inline bool has_quick_quotients(const float (&numerators)[count], const float (&v)[count],
                                           float eps) {
  constexpr uint32_t least_root = (127u - 101) << 23, roots = (101u + 48) << 23;  // 2^-101 to 2^48
  constexpr uint32_t least_numerator = (127u - 100) << 24, all_numerators = (100u + 60) << 24;  // to 2^60
  uint32_t root = 0, numerator = 0;
#pragma unroll
  for (int i = 0; i < count; i++) {
    root = max(root, static_cast<uint32_t>(bits(v[i])) - least_root);
    numerator = max(numerator, 2 * static_cast<uint32_t>(bits(numerators[i])) - least_numerator);
  }
  return root <= roots && numerator <= all_numerators && eps >= 0 && eps <= 0x1p24f;
}

// Makes numerators / (sqrt(v) + eps) of the numerators.
template <int count>
__device__ inline void divide_by_roots(float (&numerators)[count], const float (&v)[count], float eps) {
  if (kHasQuickQuotients && __builtin_expect(has_quick_quotients(numerators, v, eps), true)) {
#pragma unroll
    for (int i = 0; i < count; i++) numerators[i] = quick_quotient(numerators[i], quick_root(v[i]) + eps);
  } else {
#pragma unroll
    for (int i = 0; i < count; i++) numerators[i] = numerators[i] / (sqrtf(v[i]) + eps);
  }
}

}  // namespace bnb
