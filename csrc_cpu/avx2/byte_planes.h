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

// What Products of the two kinds below share: vectors of f32, and how many rows of A there are for them.
class PlaneProducts {
 public:
  typedef float Element;
  typedef F32 Vector;
  typedef GroupCodes Words;
  static constexpr int kVectors = kWord;
  static constexpr int kMostRows = 8;
  static constexpr int columns(int rows) { return rows <= 2 ? kStreams : 1; }

  static BNB_INLINE F32 load(const float* x) { return BNB_TARGET::load(x); }
  static BNB_INLINE F32 multiply_add(F32 values, F32 x, F32 sums) { return fma(values, x, sums); }
  template <class T>
  static void read(const T* a, int64_t n, float* group) {
    FloatProducts::read(a, n, group);
  }

 protected:
  // Vector i takes the elements from the bytes byte_of(i, lane) of each half of a group: the even ones in the
  // first half of the vectors.
  template <class ByteOf>
  static BNB_INLINE void reorder_bytes(const float* group, float* out, const ByteOf& byte_of) {
    constexpr int kHalf = kLanes / 2;
    for (int i = 0; i < kVectors; i++) {
      for (int lane = 0; lane < kLanes; lane++) {
        const int byte = 16 * (lane / kHalf) + byte_of(i % (kVectors / 2), lane % kHalf);
        out[i * kLanes + lane] = group[2 * byte + i / (kVectors / 2)];
      }
    }
  }
};

// Values in f32, four planes of bytes.
class FloatPlaneProducts : public PlaneProducts {
 public:
  explicit FloatPlaneProducts(const float* code) {
    for (int i = 0; i < 4; i++) planes_[i] = byte_plane(code, i);
  }
  BNB_INLINE GroupValues decode(const GroupCodes& codes) const {
    GroupValues result;
    look_up(codes.even, result.values);
    look_up(codes.odd, result.values + kVectors / 2);
    return result;
  }
  static void reorder(const float* group, float* out) {
    reorder_bytes(group, out, [](int vector, int lane) { return 4 * vector + lane; });
  }

 private:
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

  __m256i planes_[4];
};

// Values rounded to bf16, two planes of bytes.
class BFloat16PlaneProducts : public PlaneProducts {
 public:
  explicit BFloat16PlaneProducts(const float* code) {
    float rounded[16];
    for (int i = 0; i < 16; i += kLanes)
      store(rounded + i, from_bits(round_to_bfloat16(BNB_TARGET::load(code + i))));
    low_ = byte_plane(rounded, 2);
    high_ = byte_plane(rounded, 3);
  }
  BNB_INLINE GroupValues decode(const GroupCodes& codes) const {
    GroupValues result;
    look_up(codes.even, result.values);
    look_up(codes.odd, result.values + kVectors / 2);
    return result;
  }
  // A vector of pairs becomes one of their first and one of their second values.
  static void reorder(const float* group, float* out) {
    reorder_bytes(group, out, [](int vector, int lane) { return 8 * (vector / 2) + 2 * lane + vector % 2; });
  }

 private:
  BNB_INLINE void look_up(__m256i codes, F32* out) const {
    const __m256i low = _mm256_shuffle_epi8(low_, codes), high = _mm256_shuffle_epi8(high_, codes);
    const auto put = [](__m256i pairs, F32* values) {
      values[0] = (F32)_mm256_slli_epi32(pairs, 16);
      values[1] = (F32)_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000)));
    };
    put(_mm256_unpacklo_epi8(low, high), out);
    put(_mm256_unpackhi_epi8(low, high), out + 2);
  }

  __m256i low_, high_;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
