// int8 products with vpdpbusd, four at a time.
#pragma once

#include "../generic/int8.h"

namespace bnb::BNB_TARGET {
namespace {

// vpdpbusd multiplies unsigned with signed bytes: flipping its top bit raises a signed byte by 128.
struct VnniDot {
  typedef __m512i Vector;
  static constexpr int kStep = 64;
  static constexpr int32_t kOffset = 128;
  static BNB_INLINE Vector left(const int8_t* p) { return _mm512_loadu_si512(p); }
  static BNB_INLINE Vector right(const int8_t* p) {
    return _mm512_xor_si512(left(p), _mm512_set1_epi8(-128));
  }
  static BNB_INLINE I32 add(I32 sums, Vector a, Vector b) {
    return (I32)_mm512_dpbusd_epi32((__m512i)sums, b, a);
  }
};

}  // namespace
}  // namespace bnb::BNB_TARGET
