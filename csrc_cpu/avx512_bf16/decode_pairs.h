// 4-bit weights decoded to pairs of bf16 that lie below each other, for sums along N.
#pragma once

#include "../generic/backward.h"
#include "decode.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int kSpanColumns = 64;                      // of W, decoded at a time; they lie in one block
constexpr int kSpanTiles = kSpanColumns / kTileSide;  // vector s holds columns 4 * lane + (s ^ 1)
constexpr int64_t kGroupSpans = 4;  // share what is read of dY, and two cache lines of a row

// Decodes spans of two rows of W at a time: element (row, column) becomes half `row` of word column / 4.
class PairDecoder {
 public:
  PairDecoder(const Weight4bit& w, const float* scales)
      : packed_(w.packed),
        scales_(scales),
        N_(w.N),
        K_(w.K),
        shift_(w.block_shift()),
        code_(load(w.format().codebook)) {}

  // A span of rows n and n + 1 to kSpanTiles vectors, `stride` bytes apart; zeros where there is no such row.
  BNB_INLINE void decode(int64_t n, int64_t column, int64_t stride, uint8_t* out) const {
    const int64_t first = n * K_ + column;
    const int64_t second = n + 1 < N_ ? first + K_ : first;
    const __m512i codebooks = n < N_ ? two_codebooks(first, second, n + 1 < N_) : _mm512_setzero_si512();
    const __m512i words =
        n < N_ ? _mm512_or_si512(load_words_of(first), _mm512_slli_epi32(load_words_of(second), 16))
               : _mm512_setzero_si512();
    for (int s = 0; s < kSpanTiles; s++) {
      // The odd halves take the second codebook.
      const __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4 * s), _mm512_set1_epi16(15),
                                                      _mm512_set1_epi32(16 << 16), 0xea);
      _mm512_store_si512(out + s * stride, _mm512_permutexvar_epi16(index, codebooks));
    }
  }

 private:
  static constexpr int64_t kRowsAhead = 16;  // that are fetched

  // The codebook times the scale of each of two elements, rounded to bf16.
  BNB_INLINE __m512i two_codebooks(int64_t first, int64_t second, bool has_second) const {
    const F32 low = code_ * splat(scales_[first >> shift_]);
    const F32 high = has_second ? code_ * splat(scales_[second >> shift_]) : F32{};
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
  BNB_INLINE __m512i load_words_of(int64_t element) const {
    const uint8_t* p = packed_ + element / 2;
    _mm_prefetch(p + kRowsAhead * K_ / 2, _MM_HINT_T0);
    return _mm512_cvtepu16_epi32(load_256(p));
  }

  const uint8_t* packed_;
  const float* scales_;
  int64_t N_, K_;
  int shift_;
  F32 code_;
};

// A row of a span's sums, those of vector s at sums[s], to bf16 in the order of the columns.
BNB_INLINE void finish_span(const F32 (&sums)[kSpanTiles], BFloat16* out) {
  const auto pairs = [](F32 even, F32 odd) {
    const I32 low = (round_to_bfloat16(even) >> 16) & 0xffff;
    return (__m512i)(low | (round_to_bfloat16(odd) & static_cast<int32_t>(0xffff0000)));
  };
  const __m512i first = pairs(sums[1], sums[0]), second = pairs(sums[3], sums[2]);
  const __m512i low = _mm512_unpacklo_epi32(first, second), high = _mm512_unpackhi_epi32(first, second);
  const __m512i front = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i back = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi64(low, front, high));
  _mm512_storeu_si512(out + kSpanColumns / 2, _mm512_permutex2var_epi64(low, back, high));
}

// A gradient by decoded pairs, for a Kernel whose multiply(dY, M, w, scales, dA) takes up to
// kMostRearrangedRows rows.
template <class Kernel>
struct PairsBackward4bit {
  static bool serves(const Matrix& dY, const Weight4bit& w) {
    return dY.dtype == DType::bf16 && w.N >= kLeastTerms && w.K % kSpanColumns == 0 &&
           w.blocksize >= kSpanColumns;
  }

  static void run(const Matrix& dY, const Weight4bit& w, void* dA) {
    const Buffer<float> buffer(w.scales.absmax ? 0 : w.blocks() + kLanes);
    const float* const scales = all_scales(w, buffer.data());
    const auto* y = dY.as<const BFloat16>();
    auto* a = static_cast<BFloat16*>(dA);
    for (int64_t row = 0; row < dY.rows; row += kMostRearrangedRows) {
      const int64_t rows = min(dY.rows - row, kMostRearrangedRows);
      Kernel::multiply(y + row * w.N, rows, w, scales, a + row * w.K);
    }
  }

  // Finishes some spans of all M rows by group.finish(row, span, out).
  template <class Group>
  static void finish(const Group& group, int64_t M, int64_t spans, int64_t K, BFloat16* dA) {
    for (int64_t row = 0; row < M; row++) {
      for (int64_t span = 0; span < spans; span++) {
        group.finish(row, span, dA + row * K + span * kSpanColumns);
      }
    }
  }
};

}  // namespace
}  // namespace bnb::BNB_TARGET
