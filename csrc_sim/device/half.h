// half and bfloat16: 16 bits that round to nearest even, with the conversions and arithmetic of the devices.
//
// Arithmetic goes through float and is rounded once more, which is exact for + - * / and square roots: float
// has more than twice the digits of either type, and two to spare.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "language.h"

namespace bnb::simulator {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// bits >> shift, to nearest even.
constexpr uint32_t shift_to_nearest(uint32_t bits, int shift) {
  const uint32_t odd = bits >> shift & 1;
  return (bits + (1u << (shift - 1)) - 1 + odd) >> shift;
}

// IEEE binary16; every NaN becomes 0x7fff.
inline uint16_t half_bits(float value) {
  const uint32_t bits = bits_of(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x47800000) return sign | 0x7c00;  // 65536 and more
  if (magnitude < 0x33000000) return sign;            // less than half of the least subnormal
  const int exponent = static_cast<int>(magnitude >> 23);
  if (exponent < 113) {  // subnormal
    const uint32_t significand = (magnitude & 0x7fffff) | 0x800000;
    return static_cast<uint16_t>(sign | shift_to_nearest(significand, 126 - exponent));
  }
  return static_cast<uint16_t>(sign | shift_to_nearest(magnitude - (112u << 23), 13));
}

inline float half_value(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00) return float_of(sign | (magnitude << 13) | 0x7f800000);
  if (magnitude < 0x0400) {
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -subnormal : subnormal;
  }
  return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

// The upper half of a float; every NaN becomes 0x7fff.
inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>(shift_to_nearest(bits, 16));
}

inline float bfloat16_value(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

}  // namespace bnb::simulator

// A type of 16 bits with its pair and raw type, the conversions named in CUDA's headers, and arithmetic.
// from_float(float) and to_float(bits) are the functions above; half and half2, bfloat16 and bfloat162
// complete the names of conversions.
#define BNB_SIMULATOR_FLOAT16(Type, Type2, RawType, short_name, short_name2, from_float, to_float)       \
  struct RawType {                                                                                       \
    unsigned short x;                                                                                    \
  };                                                                                                     \
  struct alignas(2) Type {                                                                               \
    unsigned short bits;                                                                                 \
    Type() = default;                                                                                    \
    Type(RawType raw) : bits(raw.x) {}                                                                   \
    Type(float value) : bits(from_float(value)) {}                                                       \
    Type(double value) : bits(from_float(bnb::simulator::round_to_odd(value))) {}                        \
    Type(int value) : Type(static_cast<double>(value)) {}                                                \
    operator float() const { return to_float(bits); }                                                    \
    operator RawType() const { return {bits}; }                                                          \
  };                                                                                                     \
  struct alignas(4) Type2 {                                                                              \
    Type x, y;                                                                                           \
  };                                                                                                     \
  inline float __##short_name##2float(Type value) { return value; }                                      \
  inline Type __float2##short_name(float value) { return value; }                                        \
  inline Type __float2##short_name##_rn(float value) { return value; }                                   \
  inline Type __double2##short_name(double value) { return value; }                                      \
  inline unsigned short __##short_name##_as_ushort(Type value) { return value.bits; }                    \
  inline Type __ushort_as_##short_name(unsigned short bits) { return RawType{bits}; }                    \
  inline short __##short_name##_as_short(Type value) { return static_cast<short>(value.bits); }          \
  inline Type __short_as_##short_name(short bits) { return RawType{static_cast<unsigned short>(bits)}; } \
  inline Type2 make_##short_name2(Type x, Type y) { return {x, y}; }                                     \
  inline Type2 __##short_name##s2##short_name2(Type x, Type y) { return {x, y}; }                        \
  inline Type2 __##short_name##2##short_name2(Type value) { return {value, value}; }                     \
  inline float2 __##short_name2##2float2(Type2 pair) { return {pair.x, pair.y}; }                        \
  inline Type2 __float22##short_name2##_rn(float2 pair) { return {Type(pair.x), Type(pair.y)}; }         \
  inline Type2 __floats2##short_name2##_rn(float x, float y) { return {Type(x), Type(y)}; }              \
  inline Type2 __float2##short_name2##_rn(float value) { return {Type(value), Type(value)}; }            \
  inline Type __low2##short_name(Type2 pair) { return pair.x; }                                          \
  inline Type __high2##short_name(Type2 pair) { return pair.y; }                                         \
  inline float __low2float(Type2 pair) { return pair.x; }                                                \
  inline float __high2float(Type2 pair) { return pair.y; }                                               \
  inline Type operator+(Type a, Type b) { return static_cast<float>(a) + static_cast<float>(b); }        \
  inline Type operator-(Type a, Type b) { return static_cast<float>(a) - static_cast<float>(b); }        \
  inline Type operator*(Type a, Type b) { return static_cast<float>(a) * static_cast<float>(b); }        \
  inline Type operator/(Type a, Type b) { return static_cast<float>(a) / static_cast<float>(b); }        \
  inline Type operator-(Type a) { return RawType{static_cast<unsigned short>(a.bits ^ 0x8000u)}; }       \
  inline bool operator==(Type a, Type b) { return static_cast<float>(a) == static_cast<float>(b); }      \
  inline bool operator!=(Type a, Type b) { return static_cast<float>(a) != static_cast<float>(b); }      \
  inline bool operator<(Type a, Type b) { return static_cast<float>(a) < static_cast<float>(b); }        \
  inline bool operator>(Type a, Type b) { return static_cast<float>(a) > static_cast<float>(b); }        \
  inline bool operator<=(Type a, Type b) { return static_cast<float>(a) <= static_cast<float>(b); }      \
  inline bool operator>=(Type a, Type b) { return static_cast<float>(a) >= static_cast<float>(b); }      \
  inline Type __hadd(Type a, Type b) { return a + b; }                                                   \
  inline Type __hsub(Type a, Type b) { return a - b; }                                                   \
  inline Type __hmul(Type a, Type b) { return a * b; }                                                   \
  inline Type __hdiv(Type a, Type b) { return a / b; }                                                   \
  inline Type __hneg(Type a) { return -a; }                                                              \
  inline Type __habs(Type a) { return RawType{static_cast<unsigned short>(a.bits & 0x7fffu)}; }          \
  inline bool __hisnan(Type a) { return std::isnan(static_cast<float>(a)); }                             \
  inline bool __hgt(Type a, Type b) { return a > b; }                                                    \
  inline bool __hlt(Type a, Type b) { return a < b; }

namespace bnb::simulator {

// A double as a float whose last bit says whether anything was cut off, so that a second rounding to fewer
// digits gives what one rounding would have given.
inline float round_to_odd(double value) {
  const auto nearest = static_cast<float>(value);
  if (std::isnan(value) || std::isinf(nearest) || static_cast<double>(nearest) == value) return nearest;
  const bool away = std::fabs(static_cast<double>(nearest)) > std::fabs(value);
  return float_of((bits_of(nearest) - away) | 1);
}

}  // namespace bnb::simulator

BNB_SIMULATOR_FLOAT16(__half, __half2, __half_raw, half, half2, bnb::simulator::half_bits,
                      bnb::simulator::half_value)
BNB_SIMULATOR_FLOAT16(__nv_bfloat16, __nv_bfloat162, __nv_bfloat16_raw, bfloat16, bfloat162,
                      bnb::simulator::bfloat16_bits, bnb::simulator::bfloat16_value)

#undef BNB_SIMULATOR_FLOAT16

using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
