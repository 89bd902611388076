// int8 products of 16 values at a time.
#pragma once

#include "../generic/int8.h"

namespace bnb::BNB_TARGET {
namespace {

// What both kinds of a step of dot products have in common.
struct ByteVectors {
  typedef int8x16_t Vector;
  static constexpr int kStep = 16;
  static constexpr int32_t kOffset = 0;
  static BNB_INLINE Vector left(const int8_t* p) { return vld1q_s8(p); }
  static BNB_INLINE Vector right(const int8_t* p) { return vld1q_s8(p); }
};

// Products in 16 bits, which are added in pairs to sums of 32.
struct WideningDot : ByteVectors {
  static BNB_INLINE I32 add(I32 sums, Vector a, Vector b) {
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    return (I32)vpadalq_s16(vpadalq_s16((int32x4_t)sums, low), vmull_high_s8(a, b));
  }
};

#if defined(__ARM_FEATURE_DOTPROD)
struct DotprodDot : ByteVectors {
  static BNB_INLINE I32 add(I32 sums, Vector a, Vector b) { return (I32)vdotq_s32((int32x4_t)sums, a, b); }
};
#endif

}  // namespace
}  // namespace bnb::BNB_TARGET
