// AVX2 with FMA and F16C: 8 lanes.
#pragma once

#include <immintrin.h>

#define BNB_VECTOR_BYTES 32
#include "vector_masks.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int kRegisters = 16;
constexpr int kTableRegisters = 1;  // in which one instruction looks up
constexpr bool kHasHalfTable = true;

BNB_INLINE F32 splat(float x) { return _mm256_set1_ps(x); }
BNB_INLINE I32 splat(int32_t x) { return (I32)_mm256_set1_epi32(x); }

BNB_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
BNB_INLINE F32 sqrt(F32 x) { return _mm256_sqrt_ps(x); }
BNB_INLINE I32 max(I32 a, I32 b) { return (I32)_mm256_max_epi32((__m256i)a, (__m256i)b); }

BNB_INLINE float reduce_add(F32 x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
BNB_INLINE int32_t reduce_add(I32 x) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}
BNB_INLINE int32_t reduce_max(I32 x) {
  __m128i top = _mm_max_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1)));
}
BNB_INLINE bool any(Mask m) { return _mm256_movemask_ps(from_bits(m)) != 0; }

BNB_INLINE F32 to_float(I32 x) { return _mm256_cvtepi32_ps((__m256i)x); }
BNB_INLINE I32 round_to_int(F32 x) { return (I32)_mm256_cvtps_epi32(x); }

BNB_INLINE __m128i load_low(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
BNB_INLINE __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

BNB_INLINE I32 load(const uint8_t* p) { return (I32)_mm256_cvtepu8_epi32(load_low(p)); }
BNB_INLINE I32 load(const int8_t* p) { return (I32)_mm256_cvtepi8_epi32(load_low(p)); }

// The upper half of each lane in memory, and zeros below.
BNB_INLINE I32 load_upper(const uint16_t* p) { return (I32)_mm256_cvtepu16_epi32(load_128(p)) << 16; }

// The low halves of the lanes, which hold less than 2^16.
BNB_INLINE __m128i narrow(I32 x) {
  return _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
}
BNB_INLINE void store_upper(uint16_t* p, I32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow((x >> 16) & 0xffff));
}
BNB_INLINE __m128i narrow_to_bytes(I32 x) {
  const __m128i words = narrow(x & 0xff);
  return _mm_packus_epi16(words, words);
}
BNB_INLINE void store(uint8_t* p, I32 x) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), narrow_to_bytes(x));
}

BNB_INLINE F32 load(const Half* p) { return _mm256_cvtph_ps(load_128(p)); }
BNB_INLINE void store(Half* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

BNB_INLINE int32_t word_at(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return word;
}

// kLanes nibbles in kLanes / 2 bytes, the high one first.
BNB_INLINE I32 load_nibbles(const uint8_t* p) {
  const __m128i packed = _mm_cvtsi32_si128(word_at(p));
  const __m256i twice = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(packed, packed));
  return (I32)_mm256_srlv_epi32(twice, _mm256_setr_epi32(4, 0, 4, 0, 4, 0, 4, 0)) & 15;
}

BNB_INLINE void store_nibbles(uint8_t* p, I32 x) {
  const __m128i bytes = _mm_maddubs_epi16(narrow_to_bytes(x), _mm_set1_epi16(0x0110));  // 16 * even + odd
  const int32_t packed = _mm_cvtsi128_si32(_mm_packus_epi16(bytes, bytes));
  __builtin_memcpy(p, &packed, sizeof packed);
}

// The words that at(lane of i) gives; no lane is negative. A gather is microcode of 14 cycles on AMD's Zen 3,
// and these loads take 8; on Intel's chips from Skylake to Ice Lake, what keeps gathers from leaking has made
// them slow, too.
template <class At>
BNB_INLINE I32 load_lanes(I32 i, const At& at) {
  const auto half = [&](uint64_t low, uint64_t high) {
    return _mm_setr_epi32(at(static_cast<uint32_t>(low)), at(low >> 32), at(static_cast<uint32_t>(high)),
                          at(high >> 32));
  };
  const auto lanes = (__m256i)i;
  return (I32)_mm256_set_m128i(half(_mm256_extract_epi64(lanes, 2), _mm256_extract_epi64(lanes, 3)),
                               half(_mm256_extract_epi64(lanes, 0), _mm256_extract_epi64(lanes, 1)));
}
BNB_INLINE I32 look_up(const int32_t* values, I32 i) {
  return load_lanes(i, [=](uint64_t lane) { return word_at(values + lane); });
}
BNB_INLINE F32 look_up(const float* values, I32 i) {
  return from_bits(load_lanes(i, [=](uint64_t lane) { return word_at(values + lane); }));
}

// Words at any bytes.
BNB_INLINE I32 gather_words(const uint8_t* p, I32 offsets) {
  return load_lanes(offsets, [=](uint64_t lane) { return word_at(p + lane); });
}

BNB_INLINE F32 permute(F32 values, I32 i) { return _mm256_permutevar8x32_ps(values, (__m256i)i); }

}  // namespace
}  // namespace bnb::BNB_TARGET

#include "small_tables.h"

namespace bnb::BNB_TARGET {
namespace {

template <int size>
class Table<size, false> {
 public:
  explicit Table(const float* values) : values_(values) {}
  F32 operator[](I32 i) const { return look_up(values_, i); }

 private:
  const float* values_;
};

template <>
class Table<16, false> {
 public:
  explicit Table(const float* values) : low_(values), high_(values + 8) {}
  F32 operator[](I32 i) const { return _mm256_blendv_ps(low_[i], high_[i], from_bits(i << 28)); }

 private:
  Table<8> low_, high_;
};

// 16 values times a scale, rounded to T, of which each code takes one. Their low and their high bytes are
// looked up and put together.
template <class T>
class HalfTable {
 public:
  static constexpr int kElements = 32;  // at a time

  HalfTable(const float* values, F32 scale) {
    T rounded[16];
    for (int i = 0; i < 16; i += kLanes) store(rounded + i, load(values + i) * scale);
    const __m128i first = load_128(rounded), second = load_128(rounded + 8), low_byte = _mm_set1_epi16(0xff);
    low_ = _mm256_broadcastsi128_si256(
        _mm_packus_epi16(_mm_and_si128(first, low_byte), _mm_and_si128(second, low_byte)));
    high_ =
        _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
  }
  BNB_INLINE void look_up(const uint8_t* packed, T* out) const {
    const __m256i words = _mm256_cvtepu8_epi16(load_128(packed));
    const __m256i codes = _mm256_and_si256(
        _mm256_or_si256(_mm256_srli_epi16(words, 4), _mm256_slli_epi16(words, 8)), _mm256_set1_epi8(15));
    const __m256i low = _mm256_shuffle_epi8(low_, codes), high = _mm256_shuffle_epi8(high_, codes);
    // Each holds 8 elements of the first 16 and 8 of the last.
    const __m256i front = _mm256_unpacklo_epi8(low, high), back = _mm256_unpackhi_epi8(low, high);
    auto* const to = reinterpret_cast<__m256i*>(out);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(front, back, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(front, back, 0x31));
  }

 private:
  __m256i low_, high_;
};

// One multiply-add step of int8 dot products: kInt8Step values widened to 16 bits.
constexpr int kInt8Step = 16;
BNB_INLINE I16 load_int8(const int8_t* p) { return (I16)_mm256_cvtepi8_epi16(load_128(p)); }
BNB_INLINE I32 multiply_add_pairs(I16 a, I16 b) { return (I32)_mm256_madd_epi16((__m256i)a, (__m256i)b); }

}  // namespace
}  // namespace bnb::BNB_TARGET

#include "nibbles.h"
#include "vector_common.h"
