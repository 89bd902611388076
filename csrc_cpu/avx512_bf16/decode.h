// 4-bit weights decoded to bf16, 32 at a time.
#pragma once

#include "../avx512_vnni/rearranged.h"
#include "../generic/gemm_4bit.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int64_t kHalves = 32;  // bf16 in a vector

// A block's codebook times its scale, rounded to bf16: what dequantizing and rounding each element would
// give. It stands there twice, as the lookup takes five bits of an index.
BNB_INLINE __m512i scaled_codebook(F32 code, float scale) {
  return _mm512_broadcast_i64x4(
      _mm512_cvtepi32_epi16((__m512i)(round_to_bfloat16(code * splat(scale)) >> 16)));
}

// 32 elements of a row from their 16 bytes: the high nibble of a byte comes first.
BNB_INLINE __m512i look_up(const uint8_t* packed, __m512i codebook) {
  const __m512i byte = _mm512_cvtepu8_epi32(load_128(packed));
  const __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
  return _mm512_permutexvar_epi16(index, codebook);
}

// Decodes some elements of W to bf16. Blocks hold whole vectors.
void decode_halves(const Weight4bit& w, const RowScales& scales, int64_t first, int64_t count, uint8_t* out) {
  const F32 code = load(w.format().codebook);
  for (const int64_t end = first + count; first < end;) {
    const int64_t block_end = min(end, (first & -w.blocksize) + w.blocksize);
    const __m512i codebook = scaled_codebook(code, *scales.at(first));
    for (; first < block_end; first += kHalves, out += kTileRowBytes) {
      _mm512_storeu_si512(out, look_up(w.packed + first / 2, codebook));
    }
  }
}

// A row's elements in the order in which its codes are cheapest to look up: a span of 128 elements is 32
// words of 16 bits, and part s of the span is the nibble s of each word. The high nibble of a byte comes
// first.
constexpr int64_t kSpan = 128;
constexpr int kSpanParts = 4;
constexpr int64_t kSpanPart = kSpan / kSpanParts;

bool has_spans(const Weight4bit& w) { return w.K % kSpan == 0 && w.blocksize >= kSpan / 2; }

// Reorders one span of `rows` rows that are K elements apart.
void reorder_spans(const BFloat16* a, int rows, int64_t K, BFloat16* out) {
  alignas(64) uint16_t index[kSpanParts][kSpanPart];
  for (int s = 0; s < kSpanParts; s++) {
    for (int word = 0; word < kSpanPart; word++) index[s][word] = (kSpanParts * word + (s ^ 1)) % 64;
  }
  for (int r = 0; r < rows; r++, a += K) {
    __m512i quarters[4];
    for (int i = 0; i < 4; i++) quarters[i] = _mm512_loadu_si512(a + i * kSpan / 4);
    for (int s = 0; s < kSpanParts; s++, out += kSpanPart) {
      const __m512i order = _mm512_load_si512(index[s]);
      const __m512i low = _mm512_permutex2var_epi16(quarters[0], order, quarters[1]);
      const __m512i high = _mm512_permutex2var_epi16(quarters[2], order, quarters[3]);
      _mm512_storeu_si512(out, _mm512_mask_blend_epi16(0xffff0000, low, high));
    }
  }
}

RearrangedX rearranged(const BFloat16* a, int64_t M, int64_t K, bool in_spans) {
  if (!in_spans) return RearrangedX(a, M, K / 2);
  constexpr int kSpanWords = kSpan / 2;
  return RearrangedX(M, K / 2, Constant<kSpanWords>{},
                     [=](int64_t row, int rows, int64_t word, uint32_t* scratch) {
                       reorder_spans(a + row * K + 2 * word, rows, K, reinterpret_cast<BFloat16*>(scratch));
                       return RowWords{scratch, kSpanWords};
                     });
}

// Decodes spans of W in that order.
class SpanDecoder {
 public:
  SpanDecoder(const Weight4bit& w, const RowScales& scales)
      : packed_(w.packed), scales_(scales), code_(load(w.format().codebook)) {}

  // Elements [first, first + spans * kSpan); what holds as many from `ahead` on is fetched.
  void decode(int64_t first, int spans, int64_t ahead, uint8_t* out) const {
    for (int i = 0; i < spans; i++, first += kSpan, ahead += kSpan, out += kSpan * sizeof(BFloat16)) {
      const uint8_t* const p = packed_ + first / 2;
      _mm_prefetch(packed_ + ahead / 2, _MM_HINT_T1);
      _mm_prefetch(scales_.at(ahead), _MM_HINT_T1);
      const __m512i words = _mm512_loadu_si512(p);
      const __m512i codebook = two_codebooks(first);
      for (int s = 0; s < kSpanParts; s++) {
        const __m512i nibbles = _mm512_srli_epi16(words, 4 * s);
        const __m512i index = _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi16(15), upper_half(), 0xea);
        _mm512_storeu_si512(out + s * kTileRowBytes, _mm512_permutexvar_epi16(index, codebook));
      }
    }
  }

 private:
  // 16 in the upper 16 words: they take the second of two codebooks.
  static BNB_INLINE __m512i upper_half() {
    return _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  }

  // The codebook times the scale of the span's first and of its second half, rounded to bf16: what
  // dequantizing and rounding each element would give.
  BNB_INLINE __m512i two_codebooks(int64_t first) const {
    const F32 low = code_ * splat(*scales_.at(first));
    const F32 high = code_ * splat(*scales_.at(first + kSpan / 2));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }

  const uint8_t* packed_;
  const RowScales scales_;
  F32 code_;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
