// gemm_4bit for bf16 on tiles: 32 rows of W at a time are decoded to bf16, once, and multiplied with all of
// A.
#pragma once

#include "../generic/gemm_4bit.h"
#include "tiles.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int64_t kLeastTileRows = 3;         // below, products straight from the codes are faster
constexpr int64_t kMostTileRows = 1024;       // of A that are rearranged at a time
constexpr int64_t kFewTileRows = kPanelRows;  // whose sums stay in tiles while a panel of W is decoded

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

// Decodes a row of W to bf16. Blocks hold whole steps.
void decode_row(const Weight4bit& w, int64_t row, uint8_t* out) {
  const int64_t first = row * w.K;
  const int64_t steps_in_block = w.blocksize / BFloat16Dot::kStep;
  const F32 code = load(w.format().codebook);
  const StoredScales stored = stored_scales(w);
  float scales[kMaxScales];
  int64_t block = first / w.blocksize, read_end = block;
  const int64_t end_block = ceil_div(first + w.K, w.blocksize);
  int64_t step = 0, step_in_block = first % w.blocksize / BFloat16Dot::kStep;
  for (const float* scale = nullptr; step < w.K / BFloat16Dot::kStep; block++, scale++) {
    if (block == read_end) {
      const int64_t count = min(end_block - block, kMaxScales);
      scale = stored.read(block, count, scales);
      read_end = block + count;
    }
    const __m512i codebook = scaled_codebook(code, *scale);
    const int64_t end = min(w.K / BFloat16Dot::kStep, step + steps_in_block - step_in_block);
    for (; step < end; step++) {
      const __m512i values = look_up(w.packed + (first + step * BFloat16Dot::kStep) / 2, codebook);
      _mm512_storeu_si512(out + step * kTileRowBytes, values);
    }
    step_in_block = 0;
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
    if (spans) {
      const RowScalesReader scales(w, count);
      const SpanDecoder decoder(w, scales.read(n, count));
      for (int64_t r = 0; r < count; r++) {
        const int64_t row = (n + r) * w.K;
        decoder.decode(row, static_cast<int>(w.K / kSpan), row + 2 * kPrefetchBytes, buffer + r * row_bytes);
      }
    } else {
      for (int64_t r = 0; r < count; r++) decode_row(w, n + r, buffer + r * row_bytes);
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

  static void run(const Matrix& A, const Weight4bit& w, const void* bias, void* out) {
    const auto* a = A.as<const BFloat16>();
    auto* y = static_cast<BFloat16*>(out);
    for (int64_t row = 0; row < A.rows; row += kMostTileRows) {
      const Result<BFloat16> result{static_cast<const BFloat16*>(bias), y + row * w.N, w.N};
      gemm_4bit_tiles(a + row * w.K, min(A.rows - row, kMostTileRows), w, result);
    }
  }
};

}  // namespace
}  // namespace bnb::BNB_TARGET
