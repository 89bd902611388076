// Any machine: the compiler's vector types, lane by lane where they have no operation.
#pragma once

#define BNB_VECTOR_BYTES 16
#include "vector_masks.h"

#include "scalar_lookups.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int kRegisters = 16;
constexpr int kTableRegisters = 0;  // in which one instruction looks up
constexpr bool kHasHalfTable = false;

BNB_INLINE F32 splat(float x) { return F32{x, x, x, x}; }
BNB_INLINE I32 splat(int32_t x) { return I32{x, x, x, x}; }

BNB_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
BNB_INLINE F32 sqrt(F32 x) {
  return F32{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]), __builtin_sqrtf(x[3])};
}
BNB_INLINE I32 max(I32 a, I32 b) { return select(less(a, b), b, a); }

BNB_INLINE float reduce_add(F32 x) { return (x[0] + x[2]) + (x[1] + x[3]); }
BNB_INLINE int32_t reduce_add(I32 x) { return (x[0] + x[2]) + (x[1] + x[3]); }
BNB_INLINE int32_t reduce_max(I32 x) {
  const int32_t even = x[0] < x[2] ? x[2] : x[0], odd = x[1] < x[3] ? x[3] : x[1];
  return even < odd ? odd : even;
}
BNB_INLINE bool any(Mask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }

BNB_INLINE F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }
// To the nearest integer, ties to even, for |x| < 2^22.
BNB_INLINE I32 round_to_int(F32 x) {
  const F32 shift = splat(12582912.0f);
  return bits(x + shift) - bits(shift);
}

BNB_INLINE I32 load(const uint8_t* p) { return I32{p[0], p[1], p[2], p[3]}; }
BNB_INLINE I32 load(const int8_t* p) { return I32{p[0], p[1], p[2], p[3]}; }
BNB_INLINE void store(uint8_t* p, I32 x) {
  for (int i = 0; i < kLanes; i++) p[i] = static_cast<uint8_t>(x[i]);
}

BNB_INLINE I32 load(const uint16_t* p) { return I32{p[0], p[1], p[2], p[3]}; }
// The upper half of each lane in memory, and zeros below.
BNB_INLINE I32 load_upper(const uint16_t* p) { return load(p) << 16; }
BNB_INLINE void store_upper(uint16_t* p, I32 x) {
  for (int i = 0; i < kLanes; i++) p[i] = static_cast<uint16_t>(x[i] >> 16);
}

BNB_INLINE F32 load(const Half* p) {
  const I32 half = load(&p->bits);
  const I32 special = (half & 0x7c00) == 0x7c00;
  const F32 magnitude = from_bits((half & 0x7fff) << 13) * splat(0x1p112f);
  return from_bits(bits(magnitude) | (special & 0x7f800000) | ((half & 0x8000) << 16));
}
BNB_INLINE void store(Half* p, F32 x) {
  const I32 magnitude = bits(x) & 0x7fffffff;
  const I32 normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const I32 subnormal = bits(from_bits(magnitude) + splat(0.5f)) - bits(splat(0.5f));
  const I32 nan = ((magnitude >> 13) & 0x3ff) | 0x7e00;
  I32 half = select(magnitude < splat(0x38800000), subnormal, normal);
  half = select(magnitude < splat(0x477ff000), half, splat(0x7c00));
  half = select(magnitude > splat(0x7f800000), nan, half);
  store_upper(&p->bits, half << 16 | (bits(x) & static_cast<int32_t>(0x80000000)));
}

// kLanes nibbles in kLanes / 2 bytes, the high one first.
BNB_INLINE I32 load_nibbles(const uint8_t* p) { return I32{p[0] >> 4, p[0] & 15, p[1] >> 4, p[1] & 15}; }

BNB_INLINE void store_nibbles(uint8_t* p, I32 x) {
  p[0] = static_cast<uint8_t>(x[0] << 4 | x[1]);
  p[1] = static_cast<uint8_t>(x[2] << 4 | x[3]);
}

// Looks lanes up in `size` floats, a power of two; an index counts modulo 16 where size is 16.
template <int size>
class Table {
 public:
  explicit Table(const float* values) : values_(values) {}
  F32 operator[](I32 i) const {
    if (size == 16) i &= 15;
    return look_up(values_, i);
  }

 private:
  const float* values_;
};

// One multiply-add step of int8 dot products: kInt8Step values widened to 16 bits.
constexpr int kInt8Step = 8;
BNB_INLINE I16 load_int8(const int8_t* p) { return I16{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]}; }
BNB_INLINE I32 multiply_add_pairs(I16 a, I16 b) {
  const I32 a32 = (I32)a, b32 = (I32)b;
  return ((a32 << 16) >> 16) * ((b32 << 16) >> 16) + (a32 >> 16) * (b32 >> 16);
}

}  // namespace
}  // namespace bnb::BNB_TARGET

#include "nibbles.h"
#include "vector_common.h"
