// Masks as vectors whose lanes are all ones or all zeros, for instruction sets without mask registers.
#pragma once

#include "vector_types.h"

namespace bnb::BNB_TARGET {
namespace {

typedef I32 Mask;

BNB_INLINE Mask less(F32 a, F32 b) { return (I32)(a < b); }
BNB_INLINE Mask less_equal(F32 a, F32 b) { return (I32)(a <= b); }
BNB_INLINE Mask equal(F32 a, F32 b) { return (I32)(a == b); }
BNB_INLINE Mask less(I32 a, I32 b) { return (I32)(a < b); }
BNB_INLINE Mask equal(I32 a, I32 b) { return (I32)(a == b); }
BNB_INLINE I32 select(Mask m, I32 yes, I32 no) { return (yes & m) | (no & ~m); }
BNB_INLINE F32 select(Mask m, F32 yes, F32 no) { return from_bits(select(m, bits(yes), bits(no))); }
BNB_INLINE I32 increment(I32 x, Mask m) { return x - m; }

}  // namespace
}  // namespace bnb::BNB_TARGET
