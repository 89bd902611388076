// gemm_4bit for bf16 on tiles: 32 rows of W at a time are decoded to bf16, once, and multiplied with all of
// A.
#pragma once

#include "../avx512_bf16/decode.h"
#include "tiles.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int64_t kLeastTileRows = 3;         // below, products straight from the codes are faster
constexpr int64_t kFewTileRows = kPanelRows;  // whose sums stay in tiles while a panel of W is decoded

void finish_tiles(const Result<BFloat16>& result, Rectangle part, const uint32_t* sums) {
  result.finish(reinterpret_cast<const float*>(sums), kPanelRows, part);
}

// Up to kFewTileRows rows of A: W is decoded a span at a time, which stays in L1, and the sums stay in tiles.
// The products of one span are taken between the rows of the next: lookups and tiles then keep each other
// busy.
template <int columns>
void multiply_few_rows(const RearrangedX& x, int64_t M, const Weight4bit& w, const Result<BFloat16>& result) {
  constexpr int64_t kRowBytes = (kSpanParts + 1) * kTileRowBytes;  // no power of two: see gemm_4bit_tiles
  constexpr int64_t kPartRows = kPanelRows / kSpanParts;  // of W, decoded between two steps of products
  parallel_for(ceil_div(w.N, kPanelRows), 1, [&](int64_t begin, int64_t end) {
    const TileSession session;
    const RowScalesReader scales(w, kPanelRows);
    alignas(64) uint8_t decoded[2][kPanelRows * kRowBytes] = {};
    alignas(64) uint32_t sums[kPanelRows * kPanelRows];
    for (int64_t first = begin * kPanelRows; first < min(end * kPanelRows, w.N); first += kPanelRows) {
      const int64_t count = min(w.N - first, kPanelRows);
      const SpanDecoder decoder(w, scales.read(first, count));
      const int64_t spans = w.K / kSpan;
      int64_t ahead = (first + kPanelRows) * w.K;  // in the order of memory
      zero_sums<columns>();
      for (int64_t span = 0; span <= spans; span++) {
        uint8_t* const next = decoded[span % 2];
        const uint8_t* const previous = decoded[(span + 1) % 2];
        for (int part = 0; part < kSpanParts; part++) {
          for (int64_t r = part * kPartRows; span < spans && r < min((part + 1) * kPartRows, count); r++) {
            decoder.decode((first + r) * w.K + span * kSpan, 1, ahead, next + r * kRowBytes);
            ahead += kSpan;
          }
          if (span == 0) continue;
          add_products<BFloat16Dot, columns>(previous + part * kTileRowBytes, kRowBytes, x, 0,
                                             (span - 1) * kSpanParts + part, 1);
        }
      }
      store_sums<columns>(sums);
      finish_tiles(result, {0, M, first, count}, sums);
    }
  });
}

void gemm_4bit_tiles(const BFloat16* a, int64_t M, const Weight4bit& w, const Result<BFloat16>& result) {
  const bool spans = has_spans(w);
  const RearrangedX x = rearranged(a, M, w.K, spans);
  if (spans && M <= kTileSide) return multiply_few_rows<1>(x, M, w, result);
  if (spans && M <= kFewTileRows) return multiply_few_rows<2>(x, M, w, result);
  // Rows a line further apart than they are long: a power of two would put them all in a few sets of the
  // cache.
  const int64_t row_bytes = (x.steps() + 1) * kTileRowBytes;
  const auto decode = [&](int64_t n, int64_t count, uint8_t* buffer) {
    const RowScalesReader reader(w, count);
    const RowScales scales = reader.read(n, count);
    const SpanDecoder decoder(w, scales);
    for (int64_t r = 0; r < count; r++) {
      const int64_t row = (n + r) * w.K;
      uint8_t* const out = buffer + r * row_bytes;
      if (spans) {
        decoder.decode(row, static_cast<int>(w.K / kSpan), row + 2 * kPrefetchBytes, out);
      } else {
        decode_halves(w, scales, row, w.K, out);
      }
    }
    const int64_t padding = -count & (kPanelRows - 1);
    __builtin_memset(buffer + count * row_bytes, 0, padding * row_bytes);
    return buffer;
  };
  const auto finish = [&](Rectangle part, const uint32_t* sums) { finish_tiles(result, part, sums); };
  multiply_tiles<BFloat16Dot>(x, M, w.N, row_bytes, decode, finish);
}

struct TileGemm4bit {
  // f16 and f32 would lose bits in bf16 tiles.
  static bool serves(const Matrix& A, const Weight4bit& w) {
    return A.dtype == DType::bf16 && A.rows >= kLeastTileRows && w.K >= kLeastTerms &&
           w.K % BFloat16Dot::kStep == 0;
  }

  static void run(const Matrix& A, const Weight4bit& w, const Destination& destination) {
    const auto* a = A.as<const BFloat16>();
    for (int64_t row = 0; row < A.rows; row += kMostRearrangedRows) {
      gemm_4bit_tiles(a + row * w.K, min(A.rows - row, kMostRearrangedRows), w,
                      destination.result<BFloat16>(row));
    }
  }
};

}  // namespace
}  // namespace bnb::BNB_TARGET
