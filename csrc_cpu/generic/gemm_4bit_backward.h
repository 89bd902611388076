// dA = dY @ dequantized(W) from W as the checkpoint stores it (docs/SPEC.md section 3).
//
// The sums run down the columns of W, in the order of its rows, however many threads there are. W is decoded
// a tile at a time, as it lies in memory.
#pragma once

#include "gemm_4bit.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int64_t kWidenedBlocks = 4;  // of kBlockRows rows of dY that are widened at a time

// The scale of every block; `buffer` has room for them where they are double-quantized.
const float* all_scales(const Weight& w, float* buffer) {
  if (w.scales.absmax) return w.scales.absmax;
  parallel_for(ceil_div(w.blocks(), kChunk), grain(kChunk), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kChunk;
    w.stored_scales().decode(first, min(end * kChunk, w.blocks()) - first, buffer + first);
  });
  return buffer;
}

class ColumnsDecoder {
 public:
  ColumnsDecoder(const Weight& w, const float* scales)
      : w_(w), scales_(scales), shift_(w.block_shift()), code_(w.code) {}

  // `columns` columns from `column` on, of `depth` rows from n on: tile f32[depth, kTileColumns].
  void decode(int64_t n, int64_t depth, int64_t column, int64_t columns, float* tile) const {
    const bool plain = w_.K % kLanes == 0 && columns == kTileColumns;
    for (int64_t i = 0; i < depth; i++, tile += kTileColumns) {
      const int64_t first = (n + i) * w_.K + column;
      __builtin_prefetch(w_.packed + (first + kRowsAhead * w_.K) / 2);
      if (plain) {
        for (int v = 0; v < kTileVectors; v++) {
          const int64_t place = first + v * kLanes;
          store(tile + v * kLanes, values(load_nibbles(w_.packed + place / 2), place));
        }
      } else {
        decode_span(first, columns, tile);
      }
    }
  }

 private:
  static constexpr int64_t kRowsAhead = 16;  // that are fetched

  // Vectors are read from multiples of kLanes on: each lies in one block, and starts with a whole byte.
  void decode_span(int64_t first, int64_t count, float* out) const {
    const int64_t begin = first / kLanes * kLanes;
    float span[kTileColumns + 2 * kLanes];
    for (int64_t i = begin; i < first + count; i += kLanes) store(span + i - begin, values(codes(i / 2), i));
    for_each_vector(
        count, [&](int64_t i, auto lanes) { store(out + i, load(span + first - begin + i, lanes), lanes); });
  }

  // Of codes that begin at an element.
  BNB_INLINE F32 values(I32 codes, int64_t element) const {
    return code_[codes] * splat(scales_[element >> shift_]);
  }

  // Those of the last byte are followed by zeros.
  BNB_INLINE I32 codes(int64_t byte) const {
    if (byte + kLanes / 2 <= w_.bytes()) return load_nibbles(w_.packed + byte);
    uint8_t tail[kLanes / 2] = {};
    __builtin_memcpy(tail, w_.packed + byte, w_.bytes() - byte);
    return load_nibbles(tail);
  }

  const Weight& w_;
  const float* const scales_;
  const int shift_;
  const Table<16> code_;
};

// Some tiles of the result side by side share a part of dY that stays in L2.
template <class T>
void backward_rows(const float* dy, int64_t M, const Weight& w, const float* scales, T* dA) {
  const int64_t across = ceil_div(w.K, kTileColumns);
  const int64_t block_rows = min(M, kBlockRows);
  const int64_t least = grain(block_rows * kTileColumns * w.N / 8);
  parallel_for(ceil_div(M, kBlockRows) * across, least, [&](int64_t begin, int64_t end) {
    const ColumnsDecoder decoder(w, scales);
    const Buffer<float> tile(kTileDepth * kTileColumns);
    const Buffer<float> sums(kTilesAcross * block_rows * kTileColumns);
    __builtin_memset(tile.data(), 0, kTileDepth * kTileColumns * sizeof(float));
    for (int64_t part = begin; part < end;) {
      const int64_t row = part / across * kBlockRows, first_tile = part % across;
      const int64_t rows = min(kBlockRows, M - row);
      const int64_t tiles = min(kTilesAcross, min(end - part, across - first_tile));
      const auto sums_of = [&](int64_t t) { return sums.data() + t * rows * kTileColumns; };
      const auto column_of = [&](int64_t t) { return (first_tile + t) * kTileColumns; };
      const auto columns_of = [&](int64_t t) { return min(kTileColumns, w.K - column_of(t)); };
      __builtin_memset(sums.data(), 0, tiles * rows * kTileColumns * sizeof(float));
      for (int64_t n = 0; n < w.N; n += kTileDepth) {
        const int64_t depth = min(kTileDepth, w.N - n);
        for (int64_t t = 0; t < tiles; t++) {
          decoder.decode(n, depth, column_of(t), columns_of(t), tile.data());
          multiply_rows_with_tile(dy + row * w.N + n, rows, w.N, tile.data(), depth, sums_of(t));
        }
      }
      for (int64_t t = 0; t < tiles; t++) {
        const T* const no_bias = nullptr;
        finish_tile(sums_of(t), rows, columns_of(t), no_bias, dA + row * w.K + column_of(t), w.K);
      }
      part += tiles;
    }
  });
}

void gemm_4bit_backward(const void* dY, DType dtype, int64_t M, int64_t N, int64_t K, const uint8_t* packed,
                        const BlockScales& scales, int64_t blocksize, QuantType quant_type, void* dA) {
  if (M == 0 || K == 0) return;
  const Weight w{N, K, packed, scales, blocksize, codebook(quant_type)};
  const Buffer<float> buffer(scales.absmax ? 0 : w.blocks() + kLanes);
  const float* const decoded = all_scales(w, buffer.data());
  with_type(dtype, dA, [&](auto* a) {
    constexpr int64_t most = kWidenedBlocks * kBlockRows;
    const auto* const y = same_type(dY, a);
    const Buffer<float> wide(sizeof(*a) == sizeof(float) ? 0 : min(M, most) * N);
    for (int64_t row = 0; row < M; row += most) {
      const int64_t rows = min(most, M - row);
      backward_rows(widened(y + row * N, rows * N, wide), rows, w, decoded, a + row * K);
    }
  });
}

}  // namespace
}  // namespace bnb::BNB_TARGET
