// gemm_4bit for bf16 on tiles: 32 rows of W at a time are decoded to bf16, once, and multiplied with all of
// A.
#pragma once

#include "../generic/gemm_4bit.h"
#include "tiles.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int64_t kLeastTileRows = 5;    // below, decoding a row for each product is faster
constexpr int64_t kMostTileRows = 2048;  // of A that are rearranged at a time

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
void decode_row(const Weight& w, int64_t row, uint8_t* out) {
  const int64_t first = row * w.K;
  const int64_t steps_in_block = w.blocksize / BFloat16Dot::kStep;
  const F32 code = load(w.code);
  float scales[kMaxScales];
  int64_t block = first / w.blocksize, read_end = block;
  const int64_t end_block = ceil_div(first + w.K, w.blocksize);
  int64_t step = 0, step_in_block = first % w.blocksize / BFloat16Dot::kStep;
  for (const float* scale = nullptr; step < w.K / BFloat16Dot::kStep; block++, scale++) {
    if (block == read_end) {
      const int64_t count = min(end_block - block, kMaxScales);
      scale = w.read_scales(block, count, scales);
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

void gemm_4bit_tiles(const BFloat16* a, int64_t M, const Weight& w, const BFloat16* bias, BFloat16* out) {
  const RearrangedX x(a, M, w.K / 2);
  // Rows a line further apart than they are long: a power of two would put them all in a few sets of the
  // cache.
  const int64_t row_bytes = (x.steps() + 1) * kTileRowBytes;
  const auto decode = [&](int64_t n, int64_t count, uint8_t* buffer) {
    for (int64_t r = 0; r < count; r++) decode_row(w, n + r, buffer + r * row_bytes);
    const int64_t padding = -count & (kPanelRows - 1);
    __builtin_memset(buffer + count * row_bytes, 0, padding * row_bytes);
    return buffer;
  };
  const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const uint32_t* sums) {
    for (int64_t r = 0; r < rows; r++) {
      const auto* y = reinterpret_cast<const float*>(sums + r * kPanelRows);
      for_each_vector(columns, [&](int64_t i, auto lanes) {
        const F32 sum = load(y + i, lanes);
        const F32 result = bias ? sum + load(bias + column + i, lanes) : sum;
        store(out + (row + r) * w.N + column + i, result, lanes);
      });
    }
  };
  multiply_tiles<BFloat16Dot>(x, M, w.N, row_bytes, decode, finish);
}

void gemm_4bit_amx(const void* A, DType dtype, int64_t M, int64_t N, int64_t K, const uint8_t* packed,
                   const BlockScales& scales, int64_t blocksize, QuantType quant_type, const void* bias,
                   void* out, Stream stream) {
  // f16 and f32 would lose bits in bf16 tiles.
  if (dtype != DType::bf16 || M < kLeastTileRows || K % BFloat16Dot::kStep != 0) {
    return gemm_4bit(A, dtype, M, N, K, packed, scales, blocksize, quant_type, bias, out, stream);
  }
  const Weight w{N, K, packed, scales, blocksize, codebook(quant_type)};
  const auto* a = static_cast<const BFloat16*>(A);
  auto* y = static_cast<BFloat16*>(out);
  for (int64_t row = 0; row < M; row += kMostTileRows) {
    gemm_4bit_tiles(a + row * K, min(M - row, kMostTileRows), w, static_cast<const BFloat16*>(bias),
                    y + row * N);
  }
}

}  // namespace
}  // namespace bnb::BNB_TARGET
