// How strips multiply words of two bf16.
#pragma once

#include "../avx512_vnni/strips.h"

namespace bnb::BNB_TARGET {
namespace {

struct PairsOfHalves {
  typedef F32 Sums;
  static BNB_INLINE F32 add(F32 sums, __m512i word, __m512i x) {
    return _mm512_dpbf16_ps(sums, (__m512bh)word, (__m512bh)x);
  }
};

}  // namespace
}  // namespace bnb::BNB_TARGET
