// AVX512-BF16, which rounds to nearest and takes subnormal numbers as zero (Intel SDM, volume 2).
#pragma once

#include "avx512.h"

namespace bnb {
namespace {

BNB_SIMULATED float without_subnormal(float x) {
  return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x;
}

BNB_SIMULATED float from_bf16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return without_subnormal(result);
}

BNB_SIMULATED uint16_t to_bf16(float x) {
  x = without_subnormal(x);
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  if (x != x) return static_cast<uint16_t>(word >> 16 | 0x40);  // a quiet NaN
  return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

// sum + a * b, rounded once.
BNB_SIMULATED float add_product(float sum, uint16_t a, uint16_t b) {
  return without_subnormal(__builtin_fmaf(from_bf16(a), from_bf16(b), without_subnormal(sum)));
}

BNB_SIMULATED __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  uint16_t x[32], y[32];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  for (int i = 0; i < 16; i++) {
    for (int pair = 2 * i + 1; pair >= 2 * i; pair--) sums[i] = add_product(sums[i], x[pair], y[pair]);
  }
  return sums;
}

BNB_SIMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  uint16_t rounded[32];
  for (int i = 0; i < 16; i++) {
    rounded[i] = to_bf16(low[i]);
    rounded[i + 16] = to_bf16(high[i]);
  }
  __m512bh result;
  std::memcpy(&result, rounded, sizeof result);
  return result;
}

}  // namespace
}  // namespace bnb
