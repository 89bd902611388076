// X of Y^T = W X^T in the order in which products of pairs of bf16, or of four i8, take it: vectors hold one
// word of 16 rows.
#pragma once

#include "../generic/common.h"

namespace bnb::BNB_TARGET {
namespace {

// A tile is 16 rows of 64 bytes: 16 words of two bf16 or four i8.
constexpr int kTileRowBytes = 64;
constexpr int kTileSide = 16;  // rows of a tile; words in one
constexpr int kTileWords = kTileSide * kTileSide;
constexpr int kPanelRows = 2 * kTileSide;      // rows are padded to a multiple of these
constexpr int64_t kMostRearrangedRows = 1024;  // of X, at a time

// out[j][i] = in[i][j] for 16 x 16 words, `rows` of them given and zeros for the others.
void transpose_words(const uint32_t* in, int64_t in_stride, int rows, uint32_t* out, int64_t out_stride) {
  __m512i r[kTileSide], t[kTileSide];
  for (int i = 0; i < kTileSide; i++) {
    r[i] = i < rows ? _mm512_loadu_si512(in + i * in_stride) : _mm512_setzero_si512();
  }
  for (int i = 0; i < kTileSide; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < kTileSide; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    const __m512i low = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88),
                  high = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    t[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
  for (int i = 0; i < kTileSide; i++) _mm512_storeu_si512(out + i * out_stride, t[i]);
}

// Words of up to 16 rows, `stride` words apart.
struct RowWords {
  const uint32_t* words;
  int64_t stride;
};

// X in the order of the tiles: for every 16 rows, for every step, 16 words of K by 16 rows.
class RearrangedX {
 public:
  // `words` is the length of a row, a whole number of parts. read(row, rows, word, scratch) gives a part of
  // some rows from `word` on; it may put them into the scratch of 16 parts.
  template <int part_words, class Read>
  RearrangedX(int64_t rows, int64_t words, Constant<part_words>, const Read& read)
      : steps_(words / kTileSide),
        tiles_(ceil_div(rows, kPanelRows) * 2),
        words_(tiles_ * steps_ * kTileWords) {
    parallel_for(tiles_, grain(words * kTileSide), [&](int64_t begin, int64_t end) {
      alignas(64) uint32_t scratch[kTileSide * part_words];
      for (int64_t tile = begin; tile < end; tile++) {
        const int given = static_cast<int>(max(min(rows - tile * kTileSide, kTileSide), 0));
        uint32_t* out = words_.data() + tile * steps_ * kTileWords;
        for (int64_t word = 0; word < words; word += part_words) {
          const RowWords part = read(tile * kTileSide, given, word, scratch);
          for (int64_t i = 0; i < part_words; i += kTileSide, out += kTileWords) {
            transpose_words(part.words + i, part.stride, given, out, kTileSide);
          }
        }
      }
    });
  }

  // Rows as they lie in memory.
  RearrangedX(const void* x, int64_t rows, int64_t words)
      : RearrangedX(rows, words, Constant<kTileSide>{}, [&](int64_t row, int, int64_t word, uint32_t*) {
          return RowWords{static_cast<const uint32_t*>(x) + row * words + word, words};
        }) {}

  int64_t steps() const { return steps_; }
  int64_t bytes() const { return tiles_ * steps_ * kTileWords * 4; }
  const uint32_t* tile(int64_t index) const { return words_.data() + index * steps_ * kTileWords; }

 private:
  int64_t steps_, tiles_;
  Buffer<uint32_t> words_;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
