// The numeric intrinsics of CUDA and HIP: conversions, bits, and arithmetic with its rounding in the name.
#pragma once

#include <math.h>
#include <stdlib.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "language.h"

namespace bnb::simulator {

template <class To, class From>
To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// A whole number as an integer the way devices convert: saturated, and NaN to 0.
template <class Integer, class Float>
Integer saturate(Float value) {
  constexpr auto kLeast = std::numeric_limits<Integer>::min();
  constexpr auto kMost = std::numeric_limits<Integer>::max();
  if (value != value) return 0;
  if (value <= static_cast<Float>(kLeast)) return kLeast;
  if (value >= static_cast<Float>(kMost)) return kMost;
  return static_cast<Integer>(value);
}

}  // namespace bnb::simulator

// Float to integer, rounded to nearest even, toward zero, down and up.
#define BNB_SIMULATOR_TO_INTEGER(Float, float_name, Integer, integer_name) \
  inline Integer __##float_name##2##integer_name##_rn(Float value) {       \
    return bnb::simulator::saturate<Integer>(rint(value));                 \
  }                                                                        \
  inline Integer __##float_name##2##integer_name##_rz(Float value) {       \
    return bnb::simulator::saturate<Integer>(trunc(value));                \
  }                                                                        \
  inline Integer __##float_name##2##integer_name##_rd(Float value) {       \
    return bnb::simulator::saturate<Integer>(floor(value));                \
  }                                                                        \
  inline Integer __##float_name##2##integer_name##_ru(Float value) {       \
    return bnb::simulator::saturate<Integer>(ceil(value));                 \
  }                                                                        \
  inline Float __##integer_name##2##float_name##_rn(Integer value) { return static_cast<Float>(value); }

BNB_SIMULATOR_TO_INTEGER(float, float, int, int)
BNB_SIMULATOR_TO_INTEGER(float, float, unsigned, uint)
BNB_SIMULATOR_TO_INTEGER(float, float, long long, ll)
BNB_SIMULATOR_TO_INTEGER(float, float, unsigned long long, ull)
BNB_SIMULATOR_TO_INTEGER(double, double, int, int)
BNB_SIMULATOR_TO_INTEGER(double, double, unsigned, uint)
BNB_SIMULATOR_TO_INTEGER(double, double, long long, ll)
BNB_SIMULATOR_TO_INTEGER(double, double, unsigned long long, ull)

#undef BNB_SIMULATOR_TO_INTEGER

inline float __double2float_rn(double value) { return static_cast<float>(value); }

inline int __float_as_int(float value) { return bnb::simulator::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return bnb::simulator::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return bnb::simulator::bit_cast<float>(bits); }
inline float __uint_as_float(unsigned bits) { return bnb::simulator::bit_cast<float>(bits); }
inline long long __double_as_longlong(double value) { return bnb::simulator::bit_cast<long long>(value); }
inline double __longlong_as_double(long long bits) { return bnb::simulator::bit_cast<double>(bits); }

// The compiler must not contract these: -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

// Approximate on devices; here exact but for their last rounding.
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float rsqrtf(float a) { return static_cast<float>(1.0 / sqrt(static_cast<double>(a))); }
inline float __frsqrt_rn(float a) { return rsqrtf(a); }
inline float __saturatef(float a) { return a > 0.0f ? fminf(a, 1.0f) : 0.0f; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }
inline int __clzll(long long bits) {
  return bits ? __builtin_clzll(static_cast<unsigned long long>(bits)) : 64;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline unsigned __brev(unsigned bits) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (bits >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<unsigned>(both << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<unsigned>(both >> (shift & 31));
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

// Four bytes of the eight of y:x; each nibble of the selector picks one, or its sign with the nibble's top
// bit.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i) & 15;
    const auto byte = static_cast<uint8_t>(bytes >> (8 * (pick & 7)));
    const unsigned chosen = (pick & 8) ? (byte & 0x80 ? 0xffu : 0u) : byte;
    result |= chosen << (8 * i);
  }
  return result;
}

// sum + the dot product of four bytes each, wrapping around.
inline int __dp4a(int a, int b, int sum) {
  auto total = static_cast<unsigned>(sum);
  for (int shift = 0; shift < 32; shift += 8)
    total += static_cast<unsigned>(static_cast<int8_t>(a >> shift) * static_cast<int8_t>(b >> shift));
  return static_cast<int>(total);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
  for (int shift = 0; shift < 32; shift += 8) sum += (a >> shift & 255) * (b >> shift & 255);
  return sum;
}

#define BNB_SIMULATOR_MIN_MAX(T)                   \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }

BNB_SIMULATOR_MIN_MAX(int)
BNB_SIMULATOR_MIN_MAX(unsigned)
BNB_SIMULATOR_MIN_MAX(long)
BNB_SIMULATOR_MIN_MAX(unsigned long)
BNB_SIMULATOR_MIN_MAX(long long)
BNB_SIMULATOR_MIN_MAX(unsigned long long)

#undef BNB_SIMULATOR_MIN_MAX

inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
