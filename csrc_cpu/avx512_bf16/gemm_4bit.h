// gemm_4bit for bf16 by vdpbf16ps: some rows of W are decoded to bf16, a part of K at a time, and multiplied
// with all of A.
#pragma once

#include "gemv_4bit.h"
#include "strips.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int64_t kMostRows = 1024;  // of A that are rearranged at a time

// kStripRows rows of W with all of A.
class StripPanel {
 public:
  StripPanel(const RearrangedX& x, int64_t M, const Weight4bit& w, bool in_spans)
      : x_(x),
        M_(M),
        w_(w),
        in_spans_(in_spans),
        scales_(w, kStripRows),
        decoded_(kStripRows * kStripStride),
        sums_(ceil_div(M, kBlockColumns) * kBlockSums) {}

  void multiply(int64_t first, int64_t count) {
    const RowScales scales = scales_.read(first, count);
    __builtin_memset(sums_.data(), 0, ceil_div(M_, kBlockColumns) * kBlockSums * sizeof(float));
    for (int64_t k = 0; k < w_.K; k += 2 * kStripDepth) {
      const int64_t depth = min(w_.K - k, 2 * kStripDepth);
      decode(scales, first, count, k, depth);
      for (int64_t row = 0; row < M_; row += kBlockColumns) {
        const uint32_t* const vectors = x_.tile(row / kTileSide) + k / 2 * kTileSide;
        add_strips(decoded_.data(), count, vectors, min(M_ - row, kBlockColumns), x_.steps() * kTileWords,
                   depth / 2, sums(row));
      }
    }
  }

  void finish(const Result<BFloat16>& result, int64_t first, int64_t count) const {
    alignas(64) uint32_t rows[kBlockColumns * kStripRows];
    for (int64_t row = 0; row < M_; row += kBlockColumns) {
      for (int64_t n = 0; n < kStripRows; n += kTileSide) {
        for (int64_t m = 0; m < kBlockColumns; m += kTileSide) {
          const auto* tile = reinterpret_cast<const uint32_t*>(sums(row) + n * kBlockColumns + m);
          transpose_words(tile, kBlockColumns, kTileSide, rows + m * kStripRows + n, kStripRows);
        }
      }
      result.finish(reinterpret_cast<const float*>(rows), kStripRows,
                    {row, min(M_ - row, kBlockColumns), first, count});
    }
  }

 private:
  static constexpr int64_t kBlockSums = kStripRows * kBlockColumns;

  float* sums(int64_t row) const { return sums_.data() + row / kBlockColumns * kBlockSums; }

  void decode(const RowScales& scales, int64_t first, int64_t count, int64_t k, int64_t depth) const {
    const SpanDecoder decoder(w_, scales);
    for (int64_t r = 0; r < count; r++) {
      const int64_t element = (first + r) * w_.K + k;
      auto* const out = reinterpret_cast<uint8_t*>(decoded_.data() + r * kStripStride);
      if (in_spans_) {
        decoder.decode(element, static_cast<int>(depth / kSpan), element + depth, out);
      } else {
        decode_halves(w_, scales, element, depth, out);
      }
    }
  }

  const RearrangedX& x_;
  const int64_t M_;
  const Weight4bit& w_;
  const bool in_spans_;
  const RowScalesReader scales_;
  const Buffer<uint32_t> decoded_;
  const Buffer<float> sums_;
};

struct StripGemm4bit {
  // f16 and f32 would lose bits in bf16.
  static bool serves(const Matrix& A, const Weight4bit& w) {
    return A.dtype == DType::bf16 && w.K >= kLeastTerms && (few(A) || w.K % kHalves == 0);
  }

  static void run(const Matrix& A, const Weight4bit& w, const void* bias, void* out) {
    const auto* a = A.as<const BFloat16>();
    auto* y = static_cast<BFloat16*>(out);
    const auto* b = static_cast<const BFloat16*>(bias);
    if (few(A))
      return gemv_4bit<BFloat16Products>(Gemm4bit<BFloat16>{a, A.rows, w, w.format().codebook, {b, y, w.N}});
    for (int64_t row = 0; row < A.rows; row += kMostRows) {
      const int64_t rows = min(A.rows - row, kMostRows);
      const Result<BFloat16> result{b, y + row * w.N, w.N};
      multiply(rearranged(a + row * w.K, rows, w.K, has_spans(w)), rows, w, result);
    }
  }

 private:
  static bool few(const Matrix& A) { return A.rows <= BFloat16Products::kMostRows; }

  static void multiply(const RearrangedX& x, int64_t M, const Weight4bit& w, const Result<BFloat16>& result) {
    parallel_for(ceil_div(w.N, kStripRows), grain(kStripRows * w.K, kMultipliedShare / M),
                 [&](int64_t begin, int64_t end) {
                   StripPanel panel(x, M, w, has_spans(w));
                   for (int64_t first = begin * kStripRows; first < min(end * kStripRows, w.N);
                        first += kStripRows) {
                     const int64_t count = min(w.N - first, kStripRows);
                     panel.multiply(first, count);
                     panel.finish(result, first, count);
                   }
                 });
  }
};

}  // namespace
}  // namespace bnb::BNB_TARGET
