// AVX-512 F, BW, DQ, VL: 16 lanes, mask registers.
#pragma once

// GCC 12 takes the deliberately undefined operands inside these intrinsics for mistakes of the caller.
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#define BNB_VECTOR_BYTES 64
#include "vector_types.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int kRegisters = 32;
constexpr int kTableRegisters = 2;  // in which one instruction looks up
constexpr bool kHasHalfTable = true;

BNB_INLINE F32 splat(float x) { return _mm512_set1_ps(x); }
BNB_INLINE I32 splat(int32_t x) { return (I32)_mm512_set1_epi32(x); }

typedef __mmask16 Mask;
BNB_INLINE Mask less(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
BNB_INLINE Mask less_equal(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
BNB_INLINE Mask equal(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
BNB_INLINE Mask less(I32 a, I32 b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
BNB_INLINE Mask equal(I32 a, I32 b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
BNB_INLINE I32 select(Mask m, I32 yes, I32 no) {
  return (I32)_mm512_mask_blend_epi32(m, (__m512i)no, (__m512i)yes);
}
BNB_INLINE F32 select(Mask m, F32 yes, F32 no) { return _mm512_mask_blend_ps(m, no, yes); }
BNB_INLINE I32 increment(I32 x, Mask m) {
  return (I32)_mm512_mask_sub_epi32((__m512i)x, m, (__m512i)x, _mm512_set1_epi32(-1));
}

BNB_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
BNB_INLINE F32 sqrt(F32 x) { return _mm512_sqrt_ps(x); }
BNB_INLINE I32 max(I32 a, I32 b) { return (I32)_mm512_max_epi32((__m512i)a, (__m512i)b); }

BNB_INLINE float reduce_add(F32 x) { return _mm512_reduce_add_ps(x); }
BNB_INLINE int32_t reduce_add(I32 x) { return _mm512_reduce_add_epi32((__m512i)x); }
// The sum of each of 16 vectors: halves of two are added at a time.
BNB_INLINE I32 reduce_adds(const I32 (&x)[16]) {
  __m512i sums[16];
  for (int i = 0; i < 16; i++) sums[i] = (__m512i)x[i];
  for (int i = 0; i < 8; i++) {
    sums[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[2 * i], sums[2 * i + 1]),
                               _mm512_unpackhi_epi32(sums[2 * i], sums[2 * i + 1]));
  }
  for (int i = 0; i < 4; i++) {
    sums[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(sums[2 * i], sums[2 * i + 1]),
                               _mm512_unpackhi_epi64(sums[2 * i], sums[2 * i + 1]));
  }
  for (int i = 0; i < 2; i++) {
    sums[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(sums[2 * i], sums[2 * i + 1], 0x88),
                               _mm512_shuffle_i32x4(sums[2 * i], sums[2 * i + 1], 0xdd));
  }
  return (I32)_mm512_add_epi32(_mm512_shuffle_i32x4(sums[0], sums[1], 0x88),
                               _mm512_shuffle_i32x4(sums[0], sums[1], 0xdd));
}
BNB_INLINE int32_t reduce_max(I32 x) { return _mm512_reduce_max_epi32((__m512i)x); }
BNB_INLINE bool any(Mask m) { return m != 0; }

BNB_INLINE F32 to_float(I32 x) { return _mm512_cvtepi32_ps((__m512i)x); }
BNB_INLINE I32 round_to_int(F32 x) { return (I32)_mm512_cvtps_epi32(x); }

BNB_INLINE __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
BNB_INLINE __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// For each 16-bit lane, where its pair is in a vector of halves; and where the upper half of each word is.
BNB_INLINE __m512i words_of_halves() {
  I32 indices;
  for (int i = 0; i < kLanes; i++) indices[i] = i << 16 | i;
  return (__m512i)indices;
}
BNB_INLINE __m512i halves_of_words() {
  I32 indices{};
  for (int i = 0; i < kLanes / 2; i++) indices[i] = (4 * i + 3) << 16 | (4 * i + 1);
  return (__m512i)indices;
}

BNB_INLINE I32 load(const uint8_t* p) { return (I32)_mm512_cvtepu8_epi32(load_128(p)); }
BNB_INLINE I32 load(const int8_t* p) { return (I32)_mm512_cvtepi8_epi32(load_128(p)); }

// The upper half of each lane in memory, and zeros below.
BNB_INLINE I32 load_upper(const uint16_t* p) {
  return (I32)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, words_of_halves(),
                                             _mm512_castsi256_si512(load_256(p)));
}
BNB_INLINE void store_upper(uint16_t* p, I32 x) {
  const __m512i halves = _mm512_permutexvar_epi16(halves_of_words(), (__m512i)x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(halves));
}
BNB_INLINE void store(uint8_t* p, I32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
}
BNB_INLINE F32 load(const Half* p) { return _mm512_cvtph_ps(load_256(p)); }
BNB_INLINE void store(Half* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// kLanes nibbles in kLanes / 2 bytes, the high one first.
BNB_INLINE I32 load_nibbles(const uint8_t* p) {
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m512i twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(packed, packed));
  const __m512i shifts = _mm512_set4_epi32(0, 4, 0, 4);
  return (I32)_mm512_srlv_epi32(twice, shifts) & 15;
}

BNB_INLINE void store_nibbles(uint8_t* p, I32 x) {
  const __m128i pairs = _mm_maddubs_epi16(_mm512_cvtepi32_epi8((__m512i)x), _mm_set1_epi16(1 << 8 | 1 << 4));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
}

// 16 values times a scale, rounded to the 16 bits of T: 32 of them are looked up from the nibbles of 16
// bytes, the high one first.
template <class T>
class HalfTable {
 public:
  static constexpr int kElements = 32;  // at a time

  HalfTable(const float* values, F32 scale) {
    alignas(32) T rounded[kLanes];
    store(rounded, load(values) * scale);
    values_ = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(rounded)));
  }
  BNB_INLINE void look_up(const uint8_t* packed, T* out) const {
    const __m512i byte = _mm512_cvtepu8_epi32(load_128(packed));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, values_));
  }

 private:
  __m512i values_;  // twice, as five bits of an index count
};

// A gather waits for whatever its register held, so it has to start from zeros: GCC leaves them out if it
// knows that every lane is overwritten.
BNB_INLINE Mask every_lane() {
  Mask mask = 0xffff;
#if defined(__AVX512F__)  // not in simulation, where there are no mask registers
  __asm__("" : "+k"(mask));
#endif
  return mask;
}
template <int scale>
BNB_INLINE I32 gather(const void* p, I32 i) {
  return (I32)_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), every_lane(), (__m512i)i, p, scale);
}

BNB_INLINE F32 look_up(const float* values, I32 i) { return from_bits(gather<4>(values, i)); }
BNB_INLINE I32 look_up(const int32_t* values, I32 i) { return gather<4>(values, i); }

// Words at any bytes.
BNB_INLINE I32 gather_words(const uint8_t* p, I32 offsets) { return gather<1>(p, offsets); }

BNB_INLINE F32 permute(F32 values, I32 i) { return _mm512_permutexvar_ps((__m512i)i, values); }

}  // namespace
}  // namespace bnb::BNB_TARGET

#include "small_tables.h"

namespace bnb::BNB_TARGET {
namespace {

template <int size>
class Table<size, false> {
 public:
  explicit Table(const float* values) : low_(values), high_(values + size / 2) {}
  F32 operator[](I32 i) const {
    const Mask upper = _mm512_test_epi32_mask((__m512i)i, _mm512_set1_epi32(size / 2));
    return select(upper, high_[i], low_[i]);
  }

 private:
  Table<size / 2> low_, high_;
};

template <>
class Table<256, false> {
 public:
  explicit Table(const float* values) : values_(values) {}
  F32 operator[](I32 i) const { return look_up(values_, i); }

 private:
  const float* values_;
};

template <>
class Table<32, false> {
 public:
  Table() = default;
  explicit Table(const float* values) : low_(load(values)), high_(load(values + 16)) {}
  F32 operator[](I32 i) const { return _mm512_permutex2var_ps(low_, (__m512i)i, high_); }

 private:
  F32 low_, high_;
};

// One multiply-add step of int8 dot products: kInt8Step values widened to 16 bits.
constexpr int kInt8Step = 32;
BNB_INLINE I16 load_int8(const int8_t* p) { return (I16)_mm512_cvtepi8_epi16(load_256(p)); }
BNB_INLINE I32 multiply_add_pairs(I16 a, I16 b) { return (I32)_mm512_madd_epi16((__m512i)a, (__m512i)b); }

}  // namespace
}  // namespace bnb::BNB_TARGET

#include "nibbles.h"
#include "vector_common.h"
