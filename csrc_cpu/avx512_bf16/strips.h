// Products of pairs of bf16, summed in f32 by vdpbf16ps: rows of words are broadcast, and vectors hold one
// word of 16 columns each.
#pragma once

#include "rearranged.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int64_t kStripDepth = 256;  // words of a row that are multiplied at a time
constexpr int64_t kStripStride =
    kStripDepth + kTileSide;          // words: a power of two would fill a few sets of the cache
constexpr int kMostStripColumns = 4;  // vectors
constexpr int64_t kBlockColumns = kMostStripColumns * kTileSide;  // that sums have side by side
constexpr int64_t kStripRows = 48;                                // a multiple of the rows of every strip

// Of a strip so many vectors wide: as many as keep their sums in registers, and as GCC unrolls.
constexpr int strip_rows(int columns) { return columns == 1 ? 16 : 24 / columns; }

// Adds the products of `rows` rows of `depth` words, kStripStride apart, with `columns` vectors a word,
// `stride` words apart, to sums f32[rows, kBlockColumns].
template <int rows, int columns>
__attribute__((noinline)) void add_strip(const uint32_t* words, const uint32_t* vectors, int64_t stride,
                                         int64_t depth, float* sums) {
  F32 partial[rows][columns];
  for (int r = 0; r < rows; r++) {
    for (int c = 0; c < columns; c++) partial[r][c] = load(sums + r * kBlockColumns + c * kTileSide);
  }
  for (int64_t k = 0; k < depth; k++, words++, vectors += kTileSide) {
    __m512bh x[columns];
    for (int c = 0; c < columns; c++) x[c] = (__m512bh)_mm512_loadu_si512(vectors + c * stride);
    for (int r = 0; r < rows; r++) {
      const auto word = (__m512bh)_mm512_set1_epi32(static_cast<int>(words[r * kStripStride]));
      for (int c = 0; c < columns; c++) partial[r][c] = _mm512_dpbf16_ps(partial[r][c], word, x[c]);
    }
  }
  for (int r = 0; r < rows; r++) {
    for (int c = 0; c < columns; c++) store(sums + r * kBlockColumns + c * kTileSide, partial[r][c]);
  }
}

// The same for up to kStripRows rows and kBlockColumns columns.
void add_strips(const uint32_t* words, int64_t rows, const uint32_t* vectors, int64_t columns, int64_t stride,
                int64_t depth, float* sums) {
  const auto add = [&](auto vectors_across) {
    constexpr int across = decltype(vectors_across)::value;
    constexpr int height = strip_rows(across);
    for (int64_t r = 0; r < rows; r += height) {
      add_strip<height, across>(words + r * kStripStride, vectors, stride, depth, sums + r * kBlockColumns);
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

}  // namespace
}  // namespace bnb::BNB_TARGET
