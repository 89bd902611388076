// AVX-512 F, BW, DQ and VL (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2).
#pragma once

#include "vectors.h"

#undef _mm512_setr_epi32  // GCC's is a macro

namespace bnb {
namespace {

// Memory. An address that is not aligned as the instruction asks stops the program, as on a machine.
BNB_SIMULATED __m512i _mm512_loadu_si512(const void* p) {
  __m512i result;
  std::memcpy(&result, p, sizeof result);
  return result;
}
BNB_SIMULATED void _mm512_storeu_si512(void* p, __m512i x) { std::memcpy(p, &x, sizeof x); }
BNB_SIMULATED void require_alignment(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) __builtin_trap();
}
BNB_SIMULATED __m512i _mm512_load_si512(const void* p) {
  require_alignment(p);
  return _mm512_loadu_si512(p);
}
BNB_SIMULATED void _mm512_store_si512(void* p, __m512i x) {
  require_alignment(p);
  _mm512_storeu_si512(p, x);
}
// Lanes without their bit in the mask are not touched in memory.
template <class Lane>
BNB_SIMULATED __m512i masked_load(uint64_t mask, const void* p) {
  Lanes<Lane> result{};
  for (int i = 0; i < kLanesOf<Lane>; i++) {
    Lane lane = 0;
    if (is_set(mask, i)) std::memcpy(&lane, static_cast<const Lane*>(p) + i, sizeof lane);
    result[i] = lane;
  }
  return (__m512i)result;
}
BNB_SIMULATED __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void* p) {
  return masked_load<uint8_t>(mask, p);
}
BNB_SIMULATED __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) {
  return masked_load<uint16_t>(mask, p);
}
BNB_SIMULATED void _mm512_mask_storeu_epi8(void* p, __mmask64 mask, __m512i x) {
  const auto bytes = (Lanes<uint8_t>)x;
  for (int i = 0; i < 64; i++) {
    if (is_set(mask, i)) static_cast<uint8_t*>(p)[i] = bytes[i];
  }
}
BNB_SIMULATED __m512i _mm512_mask_i32gather_epi32(__m512i otherwise, __mmask16 mask, __m512i index,
                                                  const void* p, int scale) {
  auto result = (Lanes<int32_t>)otherwise;
  const auto indices = (Lanes<int32_t>)index;
  for (int i = 0; i < 16; i++) {
    int32_t word;
    if (!is_set(mask, i)) continue;
    std::memcpy(&word, static_cast<const char*>(p) + int64_t{indices[i]} * scale, sizeof word);
    result[i] = word;
  }
  return (__m512i)result;
}

// Constants.
BNB_SIMULATED __m512i _mm512_setzero_si512() { return __m512i{}; }
BNB_SIMULATED __m512i _mm512_set1_epi8(char x) { return (__m512i)(Lanes<int8_t>{} + static_cast<int8_t>(x)); }
BNB_SIMULATED __m512i _mm512_set1_epi16(short x) { return (__m512i)(Lanes<int16_t>{} + x); }
BNB_SIMULATED __m512i _mm512_set1_epi32(int x) { return (__m512i)(Lanes<int32_t>{} + x); }
BNB_SIMULATED __m512i _mm512_set1_epi64(int64_t x) { return (__m512i)(Lanes<int64_t>{} + x); }
BNB_SIMULATED __m512 _mm512_set1_ps(float x) {
  return (__m512)each_lane<float>([&](int) { return x; });
}
template <class... Words>
BNB_SIMULATED __m512i _mm512_setr_epi32(Words... words) {
  static_assert(sizeof...(words) == 16, "a lane for each");
  return (__m512i)Lanes<int32_t>{words...};
}
BNB_SIMULATED __m512i _mm512_set4_epi32(int d, int c, int b, int a) {
  return _mm512_setr_epi32(a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d);
}
BNB_SIMULATED __m512i _mm512_set_epi64(int64_t h, int64_t g, int64_t f, int64_t e, int64_t d, int64_t c,
                                       int64_t b, int64_t a) {
  return (__m512i)Lanes<int64_t>{a, b, c, d, e, f, g, h};
}

// Parts. What a machine leaves undefined is no zero here.
BNB_SIMULATED __m256i _mm512_castsi512_si256(__m512i x) {
  __m256i result;
  std::memcpy(&result, &x, sizeof result);
  return result;
}
BNB_SIMULATED __m512i _mm512_castsi256_si512(__m256i x) {
  __m512i result = _mm512_set1_epi8(0x5a);
  std::memcpy(&result, &x, sizeof x);
  return result;
}
BNB_SIMULATED __m512i _mm512_inserti64x4(__m512i x, __m256i half, int place) {
  std::memcpy(reinterpret_cast<char*>(&x) + place * 32, &half, sizeof half);
  return x;
}
BNB_SIMULATED __m512i _mm512_broadcast_i64x4(__m256i x) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(x), x, 1);
}

// Bits.
BNB_SIMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
BNB_SIMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
BNB_SIMULATED __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
BNB_SIMULATED __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  __m512i result{};
  for (int row = 0; row < 8; row++) {
    if (is_set(static_cast<uint64_t>(table), row))
      result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  }
  return result;
}
BNB_SIMULATED __m512i _mm512_slli_epi32(__m512i x, unsigned n) { return (__m512i)((Lanes<uint32_t>)x << n); }
BNB_SIMULATED __m512i _mm512_srli_epi32(__m512i x, unsigned n) { return (__m512i)((Lanes<uint32_t>)x >> n); }
BNB_SIMULATED __m512i _mm512_srli_epi16(__m512i x, unsigned n) {
  return (__m512i)((Lanes<uint16_t>)x >> static_cast<uint16_t>(n));
}
BNB_SIMULATED __m512i _mm512_srlv_epi32(__m512i x, __m512i n) {
  const auto words = (Lanes<uint32_t>)x, counts = (Lanes<uint32_t>)n;
  return (__m512i)each_lane<uint32_t>([&](int i) { return counts[i] < 32 ? words[i] >> counts[i] : 0; });
}
BNB_SIMULATED __mmask64 _mm512_kunpackd(__mmask64 high, __mmask64 low) {
  return high << 32 | (low & 0xffffffff);
}

// Integers.
BNB_SIMULATED __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return (__m512i)((Lanes<uint32_t>)a + (Lanes<uint32_t>)b);
}
BNB_SIMULATED __m512i _mm512_mask_sub_epi32(__m512i otherwise, __mmask16 mask, __m512i a, __m512i b) {
  return blend<int32_t>(mask, otherwise, (__m512i)((Lanes<uint32_t>)a - (Lanes<uint32_t>)b));
}
BNB_SIMULATED __m512i _mm512_mask_sub_epi16(__m512i otherwise, __mmask32 mask, __m512i a, __m512i b) {
  return blend<int16_t>(mask, otherwise, (__m512i)((Lanes<uint16_t>)a - (Lanes<uint16_t>)b));
}
BNB_SIMULATED __m512i _mm512_subs_epu16(__m512i a, __m512i b) {
  return by_halves<__m256i>([](auto x, auto y) { return _mm256_subs_epu16(x, y); }, a, b);
}
BNB_SIMULATED __m512i _mm512_max_epi16(__m512i a, __m512i b) {
  return by_halves<__m256i>([](auto x, auto y) { return _mm256_max_epi16(x, y); }, a, b);
}
BNB_SIMULATED __m512i _mm512_max_epi32(__m512i a, __m512i b) {
  return by_halves<__m256i>([](auto x, auto y) { return _mm256_max_epi32(x, y); }, a, b);
}
BNB_SIMULATED __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  return by_halves<__m256i>([](auto x, auto y) { return _mm256_madd_epi16(x, y); }, a, b);
}
BNB_SIMULATED int _mm512_reduce_add_epi32(__m512i x) {
  uint32_t sum = 0;
  for (int i = 0; i < 16; i++) sum += ((Lanes<uint32_t>)x)[i];
  return static_cast<int>(sum);
}
BNB_SIMULATED int _mm512_reduce_max_epi32(__m512i x) {
  const auto words = (Lanes<int32_t>)x;
  int result = words[0];
  for (int i = 1; i < 16; i++) result = words[i] > result ? words[i] : result;
  return result;
}

// Floats.
BNB_SIMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return by_halves<__m256>([](auto x, auto y, auto z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}
BNB_SIMULATED __m512 _mm512_sqrt_ps(__m512 x) {
  return by_halves<__m256>([](auto y) { return _mm256_sqrt_ps(y); }, x);
}
BNB_SIMULATED __m512i _mm512_cvtps_epi32(__m512 x) {
  const auto convert = [](auto y) { return _mm256_castsi256_ps(_mm256_cvtps_epi32(y)); };
  return (__m512i)by_halves<__m256>(convert, x);
}
BNB_SIMULATED __m512 _mm512_cvtepi32_ps(__m512i x) {
  const auto convert = [](auto y) { return _mm256_castps_si256(_mm256_cvtepi32_ps(y)); };
  return (__m512)by_halves<__m256i>(convert, x);
}
BNB_SIMULATED float _mm512_reduce_add_ps(__m512 x) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  }
  return x[0];
}
BNB_SIMULATED __m512 _mm512_cvtph_ps(__m256i x) {
  const __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(x)),
                            _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
  __m512 result;
  std::memcpy(&result, halves, sizeof result);
  return result;
}
// Rounds to nearest, which csrc_cpu always asks for.
BNB_SIMULATED __m256i _mm512_cvtps_ph(__m512 x, int rounding) {
  if (rounding != _MM_FROUND_TO_NEAREST_INT) __builtin_trap();
  __m256 halves[2];
  std::memcpy(halves, &x, sizeof x);
  return _mm256_set_m128i(_mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT));
}

// Widths.
template <class Wide, class Narrow, class Half>
BNB_SIMULATED __m512i widened(Half x) {
  Narrow narrow[sizeof(Half) / sizeof(Narrow)];
  std::memcpy(narrow, &x, sizeof x);
  return (__m512i)each_lane<Wide>([&](int i) { return narrow[i]; });
}
BNB_SIMULATED __m512i _mm512_cvtepu8_epi32(__m128i x) { return widened<int32_t, uint8_t>(x); }
BNB_SIMULATED __m512i _mm512_cvtepi8_epi32(__m128i x) { return widened<int32_t, int8_t>(x); }
BNB_SIMULATED __m512i _mm512_cvtepi8_epi16(__m256i x) { return widened<int16_t, int8_t>(x); }
BNB_SIMULATED __m512i _mm512_cvtepu16_epi32(__m256i x) { return widened<int32_t, uint16_t>(x); }
template <class Half, class Narrow>
BNB_SIMULATED Half narrowed(__m512i x) {
  Narrow narrow[16];
  for (int i = 0; i < 16; i++) narrow[i] = static_cast<Narrow>(((Lanes<uint32_t>)x)[i]);
  Half result;
  std::memcpy(&result, narrow, sizeof result);
  return result;
}
BNB_SIMULATED __m128i _mm512_cvtepi32_epi8(__m512i x) { return narrowed<__m128i, uint8_t>(x); }
BNB_SIMULATED __m256i _mm512_cvtepi32_epi16(__m512i x) { return narrowed<__m256i, uint16_t>(x); }

// Comparisons and masks.
BNB_SIMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  return static_cast<__mmask16>(each_bit<float>([&](int i) {
    switch (predicate) {
      case _CMP_EQ_OQ:
        return a[i] == b[i];
      case _CMP_LT_OQ:
        return a[i] < b[i];
      case _CMP_LE_OQ:
        return a[i] <= b[i];
    }
    __builtin_trap();
  }));
}
BNB_SIMULATED __mmask16 _mm512_cmplt_epi32_mask(__m512i a, __m512i b) {
  const auto x = (Lanes<int32_t>)a, y = (Lanes<int32_t>)b;
  return static_cast<__mmask16>(each_bit<int32_t>([&](int i) { return x[i] < y[i]; }));
}
BNB_SIMULATED __mmask16 _mm512_cmpeq_epi32_mask(__m512i a, __m512i b) {
  const auto x = (Lanes<int32_t>)a, y = (Lanes<int32_t>)b;
  return static_cast<__mmask16>(each_bit<int32_t>([&](int i) { return x[i] == y[i]; }));
}
BNB_SIMULATED __mmask32 _mm512_cmplt_epu16_mask(__m512i a, __m512i b) {
  const auto x = (Lanes<uint16_t>)a, y = (Lanes<uint16_t>)b;
  return static_cast<__mmask32>(each_bit<uint16_t>([&](int i) { return x[i] < y[i]; }));
}
BNB_SIMULATED __mmask16 _mm512_test_epi32_mask(__m512i a, __m512i b) {
  const auto common = (Lanes<int32_t>)(a & b);
  return static_cast<__mmask16>(each_bit<int32_t>([&](int i) { return common[i] != 0; }));
}
BNB_SIMULATED __mmask32 _mm512_test_epi16_mask(__m512i a, __m512i b) {
  const auto common = (Lanes<int16_t>)(a & b);
  return static_cast<__mmask32>(each_bit<int16_t>([&](int i) { return common[i] != 0; }));
}
BNB_SIMULATED __mmask32 _mm512_movepi16_mask(__m512i x) {
  const auto lanes = (Lanes<int16_t>)x;
  return static_cast<__mmask32>(each_bit<int16_t>([&](int i) { return lanes[i] < 0; }));
}
BNB_SIMULATED __m512i _mm512_mask_blend_epi16(__mmask32 mask, __m512i no, __m512i yes) {
  return blend<int16_t>(mask, no, yes);
}
BNB_SIMULATED __m512i _mm512_mask_blend_epi32(__mmask16 mask, __m512i no, __m512i yes) {
  return blend<int32_t>(mask, no, yes);
}
BNB_SIMULATED __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 no, __m512 yes) {
  return (__m512)blend<int32_t>(mask, (__m512i)no, (__m512i)yes);
}

// Lanes from other places.
template <class Lane>
BNB_SIMULATED __m512i permuted(__m512i index, __m512i low, __m512i high, int tables) {
  Lane values[2 * kLanesOf<Lane>];
  std::memcpy(values, &low, sizeof low);
  std::memcpy(values + kLanesOf<Lane>, &high, sizeof high);
  const auto indices = (Lanes<Lane>)index;
  const int last = tables * kLanesOf<Lane> - 1;
  return (__m512i)each_lane<Lane>([&](int i) { return values[static_cast<int>(indices[i]) & last]; });
}
BNB_SIMULATED __m512i _mm512_permutexvar_epi16(__m512i index, __m512i x) {
  return permuted<uint16_t>(index, x, x, 1);
}
BNB_SIMULATED __m512i _mm512_maskz_permutexvar_epi16(__mmask32 mask, __m512i index, __m512i x) {
  return blend<int16_t>(mask, _mm512_setzero_si512(), _mm512_permutexvar_epi16(index, x));
}
BNB_SIMULATED __m512i _mm512_permutexvar_epi32(__m512i index, __m512i x) {
  return permuted<uint32_t>(index, x, x, 1);
}
BNB_SIMULATED __m512 _mm512_permutexvar_ps(__m512i index, __m512 x) {
  return (__m512)_mm512_permutexvar_epi32(index, (__m512i)x);
}
BNB_SIMULATED __m512i _mm512_permutex2var_epi16(__m512i low, __m512i index, __m512i high) {
  return permuted<uint16_t>(index, low, high, 2);
}
BNB_SIMULATED __m512i _mm512_permutex2var_epi64(__m512i low, __m512i index, __m512i high) {
  return permuted<uint64_t>(index, low, high, 2);
}
BNB_SIMULATED __m512 _mm512_permutex2var_ps(__m512 low, __m512i index, __m512 high) {
  return (__m512)permuted<uint32_t>(index, (__m512i)low, (__m512i)high, 2);
}
BNB_SIMULATED __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int places) {
  __m128i from[2][4], result[4];
  std::memcpy(from[0], &a, sizeof a);
  std::memcpy(from[1], &b, sizeof b);
  for (int i = 0; i < 4; i++) result[i] = from[i / 2][places >> 2 * i & 3];
  return _mm512_loadu_si512(result);
}
BNB_SIMULATED __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) {
  return by_halves<__m256i>([](auto x, auto y) { return _mm256_unpacklo_epi16(x, y); }, a, b);
}
BNB_SIMULATED __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) {
  return by_halves<__m256i>([](auto x, auto y) { return _mm256_unpackhi_epi16(x, y); }, a, b);
}
BNB_SIMULATED __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) {
  return by_halves<__m256i>([](auto x, auto y) { return _mm256_unpacklo_epi32(x, y); }, a, b);
}
BNB_SIMULATED __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) {
  return by_halves<__m256i>([](auto x, auto y) { return _mm256_unpackhi_epi32(x, y); }, a, b);
}
BNB_SIMULATED __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) {
  return by_halves<__m256i>([](auto x, auto y) { return _mm256_unpacklo_epi64(x, y); }, a, b);
}
BNB_SIMULATED __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) {
  return by_halves<__m256i>([](auto x, auto y) { return _mm256_unpackhi_epi64(x, y); }, a, b);
}

}  // namespace
}  // namespace bnb
