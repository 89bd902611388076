// AVX-512 with VBMI: permutations of bytes look up what other levels gather. On AMD's Zen 4 a gather of 16
// floats is microcode of 17 cycles or more, and a permutation of 64 bytes takes one.
#pragma once

#define BNB_OWN_BYTE_TABLE
#include "avx512.h"

namespace bnb::BNB_TARGET {
namespace {

// 256 floats, byte by byte: 64 of them are looked up with 12 instructions, and put together with 8.
class BytePlanes {
 public:
  BytePlanes() = default;
  explicit BytePlanes(const float* values) {
    for (int i = 0; i < 256; i += kLanes) {
      const auto x = (__m512i)load(values + i);
      _mm_store_si128(reinterpret_cast<__m128i*>(planes_[0] + i), _mm512_cvtepi32_epi8(x));
      _mm_store_si128(reinterpret_cast<__m128i*>(planes_[1] + i),
                      _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 8)));
      _mm_store_si128(reinterpret_cast<__m128i*>(planes_[2] + i),
                      _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 16)));
      _mm_store_si128(reinterpret_cast<__m128i*>(planes_[3] + i),
                      _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 24)));
    }
  }

  // values[j] gets those of bytes 16 * j and on.
  BNB_INLINE void look_up(__m512i bytes, F32 (&values)[4]) const {
    // Unpacking takes 4 bytes of every 16 for one vector.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i i = _mm512_permutexvar_epi32(order, bytes);
    const __mmask64 upper = _mm512_movepi8_mask(i);
    __m512i plane[4];
    for (int p = 0; p < 4; p++) {
      const auto part = [&](int quarter) { return _mm512_load_si512(planes_[p] + 64 * quarter); };
      plane[p] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(part(0), i, part(1)),
                                        _mm512_permutex2var_epi8(part(2), i, part(3)));
    }
    const __m512i low = _mm512_unpacklo_epi8(plane[0], plane[1]),
                  low2 = _mm512_unpackhi_epi8(plane[0], plane[1]);
    const __m512i high = _mm512_unpacklo_epi8(plane[2], plane[3]),
                  high2 = _mm512_unpackhi_epi8(plane[2], plane[3]);
    values[0] = (F32)_mm512_unpacklo_epi16(low, high);
    values[1] = (F32)_mm512_unpackhi_epi16(low, high);
    values[2] = (F32)_mm512_unpacklo_epi16(low2, high2);
    values[3] = (F32)_mm512_unpackhi_epi16(low2, high2);
  }

 private:
  alignas(64) uint8_t planes_[4][256];
};

constexpr int kBytes = 64;  // in a vector

BNB_INLINE __mmask64 first_bytes(int64_t n) { return n >= kBytes ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// Calls body(j, lanes) for the vectors of 16 that hold `count` of 64 elements.
template <class Body>
BNB_INLINE void for_each_of_bytes(int64_t count, const Body& body) {
  for (int j = 0; j < kBytes / kLanes; j++) {
    const int64_t left = count - j * kLanes;
    if (left >= kLanes) {
      body(j, AllLanes{});
    } else if (left > 0) {
      body(j, static_cast<int>(left));
    }
  }
}

class ByteTable {
 public:
  explicit ByteTable(const float* values) {
    if (values) planes_ = BytePlanes(values);
  }
  template <class Body>
  BNB_INLINE void for_each(const uint8_t* codes, int64_t n, const Body& body) const {
    for (int64_t i = 0; i < n; i += kBytes) {
      F32 values[4];
      planes_.look_up(_mm512_maskz_loadu_epi8(first_bytes(n - i), codes + i), values);
      for_each_of_bytes(n - i, [&](int j, auto lanes) { body(i + j * kLanes, lanes, values[j]); });
    }
  }

 private:
  BytePlanes planes_;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
