// gemm_4bit for bf16 by vdpbf16ps: some rows of W are decoded to bf16, a part of K at a time, and multiplied
// with all of A.
#pragma once

#include "dot.h"
#include "gemv_4bit.h"

namespace bnb::BNB_TARGET {
namespace {

struct StripGemm4bit {
  // f16 and f32 would lose bits in bf16.
  static bool serves(const Matrix& A, const Weight4bit& w) {
    return A.dtype == DType::bf16 && w.K >= kLeastTerms && (few(A) || w.K % kHalves == 0);
  }

  static void run(const Matrix& A, const Weight4bit& w, const Destination& destination) {
    const auto* a = A.as<const BFloat16>();
    const bool in_strips = w.K % kHalves == 0 && !few(A);
    const int64_t most = in_strips ? kMostRearrangedRows : ceil_div(A.rows, passes(A));
    for (int64_t row = 0; row < A.rows; row += most) {
      const int64_t rows = min(A.rows - row, most);
      const Result<BFloat16> result = destination.result<BFloat16>(row);
      if (in_strips) {
        multiply(rearranged(a + row * w.K, rows, w.K, has_spans(w)), rows, w, result);
      } else {
        gemv_4bit<BFloat16Products>(Gemm4bit<BFloat16>{a + row * w.K, rows, w, w.format().codebook, result});
      }
    }
  }

 private:
  // Whether passes of a few rows, each of which decodes W, are faster than strips, whose vectors hold 16
  // rows.
  static bool few(const Matrix& A) {
    constexpr int64_t kMostPasses = 3, kFullVector = 15;
    const bool fills_one = A.rows >= kFullVector && A.rows <= kTileSide;
    return passes(A) <= kMostPasses && !fills_one;
  }
  static int64_t passes(const Matrix& A) { return ceil_div(A.rows, BFloat16Products::kMostRows); }

  static void multiply(const RearrangedX& x, int64_t M, const Weight4bit& w, const Result<BFloat16>& result) {
    parallel_for(ceil_div(w.N, kStripRows), grain(kStripRows * w.K, kMultipliedShare / M),
                 [&](int64_t begin, int64_t end) {
                   const StripPanel<PairsOfHalves> panel(x, M);
                   const RowScalesReader scales(w, kStripRows);
                   for (int64_t n = begin * kStripRows; n < min(end * kStripRows, w.N); n += kStripRows) {
                     const int64_t count = min(w.N - n, kStripRows);
                     const RowScales row_scales = scales.read(n, count);
                     panel.multiply(count, [&](int64_t k, int64_t depth, uint32_t* words) {
                       decode(w, row_scales, {n, count, 2 * k, 2 * depth}, words);
                     });
                     panel.finish([&](int64_t row, int64_t rows, const uint32_t* sums) {
                       result.finish(reinterpret_cast<const float*>(sums), kStripRows, {row, rows, n, count});
                     });
                   }
                 });
  }

  static void decode(const Weight4bit& w, const RowScales& scales, Rectangle part, uint32_t* words) {
    const SpanDecoder decoder(w, scales);
    for (int64_t r = 0; r < part.rows; r++, words += kStripStride) {
      const int64_t element = (part.row + r) * w.K + part.column;
      auto* const out = reinterpret_cast<uint8_t*>(words);
      if (has_spans(w)) {
        decoder.decode(element, static_cast<int>(part.columns / kSpan), element + part.columns, out);
      } else {
        decode_halves(w, scales, element, part.columns, out);
      }
    }
  }
};

}  // namespace
}  // namespace bnb::BNB_TARGET
