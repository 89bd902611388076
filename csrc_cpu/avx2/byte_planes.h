// 4-bit codes looked up a byte of the values at a time. vpshufb takes 32 codes in half a cycle, where a
// permutation of lanes takes 8 in one (AMD, Zen 3), and interleaving the bytes costs less than what is saved.
#pragma once

#include "../generic/gemv_4bit.h"

namespace bnb::BNB_TARGET {
namespace {

// Byte `byte` of what each of 16 codes stands for, once in each half of the vector.
BNB_INLINE __m256i byte_plane(const float* code, int byte) {
  uint8_t plane[16];
  for (int i = 0; i < 16; i++)
    __builtin_memcpy(plane + i, reinterpret_cast<const uint8_t*>(code + i) + byte, 1);
  return _mm256_broadcastsi128_si256(load_128(plane));
}

// The 32 packed bytes of a group, as its codes: the high nibble of a byte comes first.
struct GroupCodes {
  __m256i even, odd;

  explicit GroupCodes(const uint8_t* p) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = _mm256_and_si256(_mm256_srli_epi16(packed, 4), _mm256_set1_epi8(15));
    odd = _mm256_and_si256(packed, _mm256_set1_epi8(15));
  }
};

// The values of a group in f32, in the order in which looking them up leaves them.
struct GroupValues {
  F32 values[kWord];
  BNB_INLINE F32 operator[](int i) const { return values[i]; }
};

constexpr int kHalfVectors = kWord / 2;  // of a group's values: the even elements, then the odd ones

// Values in f32, four planes of bytes.
class FloatPlanes {
 public:
  explicit FloatPlanes(const float* code) {
    for (int i = 0; i < 4; i++) planes_[i] = byte_plane(code, i);
  }
  BNB_INLINE void look_up(__m256i codes, F32* out) const {
    __m256i bytes[4];
    for (int i = 0; i < 4; i++) bytes[i] = _mm256_shuffle_epi8(planes_[i], codes);
    const auto put = [&](__m256i low, __m256i high, F32* values) {
      values[0] = (F32)_mm256_unpacklo_epi16(low, high);
      values[1] = (F32)_mm256_unpackhi_epi16(low, high);
    };
    put(_mm256_unpacklo_epi8(bytes[0], bytes[1]), _mm256_unpacklo_epi8(bytes[2], bytes[3]), out);
    put(_mm256_unpackhi_epi8(bytes[0], bytes[1]), _mm256_unpackhi_epi8(bytes[2], bytes[3]), out + 2);
  }
  // Which byte of each half of the codes a lane's value is of.
  static int byte_of(int vector, int lane) { return 4 * vector + lane; }

 private:
  __m256i planes_[4];
};

// Values rounded to bf16, two planes of bytes. A vector of pairs becomes one of their first and one of their
// second values.
class BFloat16Planes {
 public:
  explicit BFloat16Planes(const float* code) {
    float rounded[16];
    for (int i = 0; i < 16; i += kLanes) {
      store(rounded + i, from_bits(round_to_bfloat16(load(code + i))));
    }
    low_ = byte_plane(rounded, 2);
    high_ = byte_plane(rounded, 3);
  }
  BNB_INLINE void look_up(__m256i codes, F32* out) const {
    const __m256i low = _mm256_shuffle_epi8(low_, codes), high = _mm256_shuffle_epi8(high_, codes);
    const auto put = [](__m256i pairs, F32* values) {
      values[0] = (F32)_mm256_slli_epi32(pairs, 16);
      values[1] = (F32)_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000)));
    };
    put(_mm256_unpacklo_epi8(low, high), out);
    put(_mm256_unpackhi_epi8(low, high), out + 2);
  }
  static int byte_of(int vector, int lane) { return 8 * (vector / 2) + 2 * lane + vector % 2; }

 private:
  __m256i low_, high_;
};

// How elements of A and values that planes look up are multiplied.
template <class Planes>
class PlaneProducts {
 public:
  typedef float Element;
  typedef F32 Vector;
  typedef GroupCodes Words;
  static constexpr int kVectors = kWord;
  static constexpr int kMostRows = 8;
  static constexpr int columns(int rows) { return rows <= 2 ? kStreams : 1; }
  static constexpr int chains(int rows) { return rows <= 4 ? 2 : 1; }  // registers hold no more
  static constexpr int block(int rows) { return rows <= 2 ? 1 : 16; }

  explicit PlaneProducts(const float* code) : planes_(code) {}
  BNB_INLINE GroupValues decode(const GroupCodes& codes) const {
    GroupValues result;
    planes_.look_up(codes.even, result.values);
    planes_.look_up(codes.odd, result.values + kHalfVectors);
    return result;
  }
  static BNB_INLINE F32 load(const float* x) { return BNB_TARGET::load(x); }
  static BNB_INLINE F32 multiply_add(F32 values, F32 x, F32 sums) { return fma(values, x, sums); }

  template <class T>
  static void read(const T* a, int64_t n, float* group) {
    FloatProducts::read(a, n, group);
  }
  static void reorder(const float* group, float* out) {
    constexpr int kHalfLanes = kLanes / 2;
    for (int i = 0; i < kVectors; i++) {
      for (int lane = 0; lane < kLanes; lane++) {
        const int byte = 16 * (lane / kHalfLanes) + Planes::byte_of(i % kHalfVectors, lane % kHalfLanes);
        out[i * kLanes + lane] = group[2 * byte + i / kHalfVectors];
      }
    }
  }

 private:
  const Planes planes_;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
