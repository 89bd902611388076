// Products Y^T = W X^T in words of two bf16 or four i8: words of W's rows are broadcast, and vectors hold one
// word of 16 rows of X, so that no sum has to be taken across lanes. A Dot says how words are multiplied:
// add(sums, word, vector) in vectors of 32-bit Sums.
#pragma once

#include "rearranged.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int64_t kStripDepth = 256;  // words of a row that are multiplied at a time
constexpr int64_t kStripStride =
    kStripDepth + kTileSide;          // a power of two would fill a few sets of the cache
constexpr int kMostStripColumns = 4;  // vectors
constexpr int64_t kBlockColumns = kMostStripColumns * kTileSide;  // rows of X that sums have side by side
constexpr int64_t kStripRows = 48;                                // a multiple of the rows of every strip

// Of a strip so many vectors wide: as many as keep their sums in registers, and as GCC unrolls.
constexpr int strip_rows(int columns) { return columns == 1 ? 16 : 24 / columns; }

// Adds the products of `rows` rows of `depth` words, kStripStride apart, with `columns` vectors a word,
// `stride` words apart, to sums[rows, kBlockColumns]. Inlined, its sums would not stay in registers.
template <class Dot, int rows, int columns>
__attribute__((noinline)) void add_strip(const uint32_t* words, const uint32_t* vectors, int64_t stride,
                                         int64_t depth, uint32_t* sums) {
  typename Dot::Sums partial[rows][columns];
  for (int r = 0; r < rows; r++) {
    for (int c = 0; c < columns; c++) {
      __builtin_memcpy(&partial[r][c], sums + r * kBlockColumns + c * kTileSide, sizeof partial[r][c]);
    }
  }
  for (int64_t k = 0; k < depth; k++, words++, vectors += kTileSide) {
    __m512i x[columns];
    for (int c = 0; c < columns; c++) x[c] = _mm512_loadu_si512(vectors + c * stride);
    for (int r = 0; r < rows; r++) {
      const __m512i word = _mm512_set1_epi32(static_cast<int>(words[r * kStripStride]));
      for (int c = 0; c < columns; c++) partial[r][c] = Dot::add(partial[r][c], word, x[c]);
    }
  }
  for (int r = 0; r < rows; r++) {
    for (int c = 0; c < columns; c++) {
      __builtin_memcpy(sums + r * kBlockColumns + c * kTileSide, &partial[r][c], sizeof partial[r][c]);
    }
  }
}

// The same for up to kStripRows rows and kBlockColumns columns.
template <class Dot>
void add_strips(const uint32_t* words, int64_t rows, const uint32_t* vectors, int64_t columns, int64_t stride,
                int64_t depth, uint32_t* sums) {
  const auto add = [&](auto vectors_across) {
    constexpr int across = decltype(vectors_across)::value;
    constexpr int height = strip_rows(across);
    for (int64_t r = 0; r < rows; r += height) {
      add_strip<Dot, height, across>(words + r * kStripStride, vectors, stride, depth,
                                     sums + r * kBlockColumns);
    }
  };
  switch (ceil_div(columns, kTileSide)) {
    case 1:
      return add(Constant<1>{});
    case 2:
      return add(Constant<2>{});
    case 3:
      return add(Constant<3>{});
    default:
      return add(Constant<4>{});
  }
}

// Up to kStripRows rows of W with all M rows of X.
template <class Dot>
class StripPanel {
 public:
  StripPanel(const RearrangedX& x, int64_t M)
      : x_(x), M_(M), words_(kStripRows * kStripStride), sums_(ceil_div(M, kBlockColumns) * kBlockSums) {}

  // prepare(k, depth, words) gives words [k, k + depth) of each row of W, kStripStride apart.
  template <class Prepare>
  void multiply(int64_t rows, const Prepare& prepare) const {
    const int64_t depth_of_rows = x_.steps() * kTileSide;
    __builtin_memset(sums_.data(), 0, ceil_div(M_, kBlockColumns) * kBlockSums * sizeof(uint32_t));
    for (int64_t k = 0; k < depth_of_rows; k += kStripDepth) {
      const int64_t depth = min(depth_of_rows - k, kStripDepth);
      prepare(k, depth, words_.data());
      for (int64_t row = 0; row < M_; row += kBlockColumns) {
        add_strips<Dot>(words_.data(), rows, x_.tile(row / kTileSide) + k * kTileSide,
                        min(M_ - row, kBlockColumns), x_.steps() * kTileWords, depth, sums(row));
      }
    }
  }

  // Calls finish(row, rows, sums) for blocks of rows of X: sums[rows, kStripRows] as they are in Y.
  template <class Finish>
  void finish(const Finish& finish) const {
    alignas(64) uint32_t rows[kBlockColumns * kStripRows];
    for (int64_t row = 0; row < M_; row += kBlockColumns) {
      for (int64_t n = 0; n < kStripRows; n += kTileSide) {
        for (int64_t m = 0; m < kBlockColumns; m += kTileSide) {
          transpose_words(sums(row) + n * kBlockColumns + m, kBlockColumns, kTileSide,
                          rows + m * kStripRows + n, kStripRows);
        }
      }
      finish(row, min(M_ - row, kBlockColumns), rows);
    }
  }

 private:
  static constexpr int64_t kBlockSums = kStripRows * kBlockColumns;

  uint32_t* sums(int64_t row) const { return sums_.data() + row / kBlockColumns * kBlockSums; }

  const RearrangedX& x_;
  const int64_t M_;
  const Buffer<uint32_t> words_, sums_;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
