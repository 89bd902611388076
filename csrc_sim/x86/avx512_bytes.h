// AVX-512 on bytes: of BW, and VBMI, BITALG and VNNI (Intel SDM, volume 2).
#pragma once

#include "avx512.h"

namespace bnb {
namespace {

BNB_SIMULATED __m512i _mm512_add_epi8(__m512i a, __m512i b) {
  return (__m512i)((Lanes<uint8_t>)a + (Lanes<uint8_t>)b);
}
BNB_SIMULATED __m512i _mm512_mask_add_epi8(__m512i otherwise, __mmask64 mask, __m512i a, __m512i b) {
  return blend<int8_t>(mask, otherwise, _mm512_add_epi8(a, b));
}
BNB_SIMULATED __m512i _mm512_mask_sub_epi8(__m512i otherwise, __mmask64 mask, __m512i a, __m512i b) {
  return blend<int8_t>(mask, otherwise, (__m512i)((Lanes<uint8_t>)a - (Lanes<uint8_t>)b));
}
BNB_SIMULATED __m512i _mm512_mask_subs_epu8(__m512i otherwise, __mmask64 mask, __m512i a, __m512i b) {
  const auto subtract = [](auto x, auto y) { return _mm256_subs_epu8(x, y); };
  return blend<int8_t>(mask, otherwise, by_halves<__m256i>(subtract, a, b));
}
BNB_SIMULATED __m512i _mm512_popcnt_epi8(__m512i x) {
  const auto bytes = (Lanes<uint8_t>)x;
  return (__m512i)each_lane<uint8_t>([&](int i) { return __builtin_popcount(bytes[i]); });
}
// Bytes without sign times bytes with one: four products are added to each word, without saturation.
BNB_SIMULATED __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
  const auto x = (Lanes<uint8_t>)a;
  const auto y = (Lanes<int8_t>)b;
  auto result = (Lanes<uint32_t>)sums;
  for (int i = 0; i < 64; i++) result[i / 4] += static_cast<uint32_t>(int{x[i]} * int{y[i]});
  return (__m512i)result;
}

BNB_SIMULATED __mmask64 _mm512_movepi8_mask(__m512i x) {
  const auto bytes = (Lanes<int8_t>)x;
  return each_bit<int8_t>([&](int i) { return bytes[i] < 0; });
}
BNB_SIMULATED __mmask64 _mm512_test_epi8_mask(__m512i a, __m512i b) {
  const auto common = (Lanes<int8_t>)(a & b);
  return each_bit<int8_t>([&](int i) { return common[i] != 0; });
}
BNB_SIMULATED __mmask64 _mm512_mask_test_epi8_mask(__mmask64 mask, __m512i a, __m512i b) {
  return mask & _mm512_test_epi8_mask(a, b);
}
BNB_SIMULATED __mmask64 _mm512_cmpneq_epi8_mask(__m512i a, __m512i b) {
  return _mm512_test_epi8_mask(a ^ b, a ^ b);
}
BNB_SIMULATED __mmask64 _mm512_mask_cmpeq_epi8_mask(__mmask64 mask, __m512i a, __m512i b) {
  return mask & ~_mm512_cmpneq_epi8_mask(a, b);
}
BNB_SIMULATED __m512i _mm512_mask_blend_epi8(__mmask64 mask, __m512i no, __m512i yes) {
  return blend<int8_t>(mask, no, yes);
}

BNB_SIMULATED __m512i _mm512_permutexvar_epi8(__m512i index, __m512i x) {
  return permuted<uint8_t>(index, x, x, 1);
}
BNB_SIMULATED __m512i _mm512_permutex2var_epi8(__m512i low, __m512i index, __m512i high) {
  return permuted<uint8_t>(index, low, high, 2);
}
BNB_SIMULATED __m512i _mm512_unpacklo_epi8(__m512i a, __m512i b) {
  return by_halves<__m256i>([](auto x, auto y) { return _mm256_unpacklo_epi8(x, y); }, a, b);
}
BNB_SIMULATED __m512i _mm512_unpackhi_epi8(__m512i a, __m512i b) {
  return by_halves<__m256i>([](auto x, auto y) { return _mm256_unpackhi_epi8(x, y); }, a, b);
}

}  // namespace
}  // namespace bnb
