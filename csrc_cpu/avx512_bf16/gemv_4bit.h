// How a few rows of bf16 are multiplied with a 4-bit weight: pairs of elements at a time, by vdpbf16ps. The
// codebook is rounded to bf16, and a block's scale stays in f32.
#pragma once

#include "decode.h"

namespace bnb::BNB_TARGET {
namespace {

class BFloat16Products {
 public:
  typedef BFloat16 Element;
  typedef __m512i Vector;
  typedef BNB_TARGET::Words Words;
  static constexpr int kVectors = kSpanParts;
  static constexpr int kMostRows = 8;
  static constexpr int columns(int rows) { return rows <= 2 ? 4 : 2; }
  static constexpr int chains(int) { return 1; }
  static constexpr int block(int) { return 1; }
  static_assert(kGroup == kSpan, "a group is reordered as a span");

  explicit BFloat16Products(const float* code) : code_(scaled_codebook(BNB_TARGET::load(code), 1.0f)) {}
  BNB_INLINE __m512i operator[](I32 codes) const { return _mm512_permutexvar_epi16((__m512i)codes, code_); }
  BNB_INLINE NibbleValues<BFloat16Products, Words> decode(const Words& words) const { return {*this, words}; }
  static BNB_INLINE __m512i load(const BFloat16* x) { return _mm512_loadu_si512(x); }
  static BNB_INLINE F32 multiply_add(__m512i values, __m512i x, F32 sums) {
    return _mm512_dpbf16_ps(sums, (__m512bh)values, (__m512bh)x);
  }

  static void read(const BFloat16* a, int64_t n, BFloat16* group) {
    __builtin_memcpy(group, a, n * sizeof *a);
  }
  static void reorder(const BFloat16* group, BFloat16* out) { reorder_spans(group, 1, 0, out); }

 private:
  const __m512i code_;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
