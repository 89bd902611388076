// dA = dY @ dequantized(W) for bf16 by vdpbf16ps (docs/SPEC.md section 3): words of dY are broadcast, and
// vectors hold pairs of W's rows.
#pragma once

#include "decode_pairs.h"
#include "dot.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int64_t kDepthRows = 2 * kStripDepth;  // of W

// dY in the order of the strips: for every kStripRows rows, for every kStripDepth words, the words of these
// rows. Zeros fill them up.
class StripRows {
 public:
  StripRows(const BFloat16* y, int64_t rows, int64_t columns)
      : depths_(ceil_div(columns, kDepthRows)),
        blocks_(ceil_div(rows, kStripRows)),
        words_(blocks_ * depths_ * kBlockWords) {
    parallel_for(blocks_ * depths_, grain(kBlockWords), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        uint32_t* out = words_.data() + i * kBlockWords;
        const int64_t row = i / depths_ * kStripRows, column = i % depths_ * kDepthRows;
        const int64_t count = min(columns - column, kDepthRows);
        for (int64_t r = 0; r < kStripRows; r++, out += kStripStride) {
          const int64_t given = row + r < rows ? count : 0;
          __builtin_memcpy(out, y + (row + r) * columns + column, given * sizeof *y);
          __builtin_memset(reinterpret_cast<BFloat16*>(out) + given, 0, (kDepthRows - given) * sizeof *y);
        }
      }
    });
  }

  int64_t depths() const { return depths_; }
  const uint32_t* block(int64_t row, int64_t depth) const {
    return words_.data() + (row / kStripRows * depths_ + depth) * kBlockWords;
  }

 private:
  static constexpr int64_t kBlockWords = kStripRows * kStripStride;

  int64_t depths_, blocks_;
  Buffer<uint32_t> words_;
};

// Some spans of W's columns with all rows of dY.
class StripColumns {
 public:
  StripColumns(const StripRows& dy, int64_t M, const Weight4bit& w, const float* scales)
      : dy_(dy),
        M_(M),
        N_(w.N),
        decoder_(w, scales),
        decoded_(kGroupSpans * kSpanWords),
        sums_(kGroupSpans * ceil_div(M, kStripRows) * kBlockSums) {}

  void multiply(int64_t column, int64_t spans) {
    __builtin_memset(sums_.data(), 0, spans * ceil_div(M_, kStripRows) * kBlockSums * sizeof(uint32_t));
    for (int64_t depth = 0; depth < dy_.depths(); depth++) {
      const int64_t first = depth * kDepthRows;
      const int64_t pairs = ceil_div(min(N_ - first, kDepthRows), 2);
      decode(column, spans, first, pairs);
      for (int64_t row = 0; row < M_; row += kStripRows) {
        const int64_t rows = min(M_ - row, kStripRows);
        for (int64_t span = 0; span < spans; span++) {
          add_strips<PairsOfHalves>(dy_.block(row, depth), rows, decoded(span), kSpanColumns, kPartWords,
                                    pairs, sums(span, row));
        }
      }
    }
  }

  void finish(int64_t row, int64_t span, BFloat16* out) const {
    F32 values[kSpanTiles];
    const uint32_t* const from = sums(span, row) + row % kStripRows * kBlockColumns;
    for (int s = 0; s < kSpanTiles; s++) values[s] = (F32)_mm512_loadu_si512(from + s * kTileSide);
    finish_span(values, out);
  }

 private:
  static constexpr int64_t kPartWords = kStripDepth * kTileSide;
  static constexpr int64_t kSpanWords = kSpanTiles * kPartWords;
  static constexpr int64_t kBlockSums = kStripRows * kBlockColumns;

  void decode(int64_t column, int64_t spans, int64_t first, int64_t pairs) const {
    for (int64_t pair = 0; pair < pairs; pair++) {
      for (int64_t span = 0; span < spans; span++) {
        auto* const out = reinterpret_cast<uint8_t*>(decoded(span) + pair * kTileSide);
        decoder_.decode(first + 2 * pair, column + span * kSpanColumns, kPartWords * sizeof(uint32_t), out);
      }
    }
  }

  uint32_t* decoded(int64_t span) const { return decoded_.data() + span * kSpanWords; }
  uint32_t* sums(int64_t span, int64_t row) const {
    return sums_.data() + (span * ceil_div(M_, kStripRows) + row / kStripRows) * kBlockSums;
  }

  const StripRows& dy_;
  const int64_t M_, N_;
  const PairDecoder decoder_;
  const Buffer<uint32_t> decoded_;
  const Buffer<uint32_t> sums_;
};

struct StripBackward4bit : PairsBackward4bit<StripBackward4bit> {
  static void multiply(const BFloat16* dY, int64_t M, const Weight4bit& w, const float* scales,
                       BFloat16* dA) {
    const StripRows dy(dY, M, w.N);
    const int64_t least = grain(M * kSpanColumns * w.N / 16);
    parallel_for(w.K / kSpanColumns, least, [&](int64_t begin, int64_t end) {
      StripColumns columns(dy, M, w, scales);
      for (int64_t first = begin; first < end; first += kGroupSpans) {
        const int64_t spans = min(end - first, kGroupSpans);
        columns.multiply(first * kSpanColumns, spans);
        finish(columns, M, spans, w.K, dA + first * kSpanColumns);
      }
    });
  }
};

}  // namespace
}  // namespace bnb::BNB_TARGET
