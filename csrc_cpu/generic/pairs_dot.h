// int8 products by 16-bit products of widened values.
#pragma once

#include "int8.h"

namespace bnb::BNB_TARGET {
namespace {

struct PairsDot {
  typedef I16 Vector;
  static constexpr int kStep = kInt8Step;
  static constexpr int32_t kOffset = 0;
  static BNB_INLINE Vector left(const int8_t* p) { return load_int8(p); }
  static BNB_INLINE Vector right(const int8_t* p) { return load_int8(p); }
  static BNB_INLINE I32 add(I32 sums, Vector a, Vector b) { return sums + multiply_add_pairs(a, b); }
};

}  // namespace
}  // namespace bnb::BNB_TARGET
