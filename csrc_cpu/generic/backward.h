// dA[M, K] = dY[M, N] @ W from a weight W [N, K] as it is stored (docs/SPEC.md sections 3 and 4).
//
// The sums run down the columns of W, in the order of its rows, however many threads there are. W is decoded
// a tile at a time, as it lies in memory, by a class for each kind of weight: decode(part, tile) gives a part
// of W, of up to kTileColumns columns, as f32[part.rows, kTileColumns].
#pragma once

#include "../machine.h"
#include "gemm_4bit.h"
#include "int8.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int64_t kWidenedBlocks = 4;  // of kBlockRows rows of dY that are widened at a time

// Whether torch's dense matmul is faster, in spite of the whole weight that is written down for it.
bool dense_is_faster(const Matrix& dY) {
  constexpr int64_t kFewRows = 16;
  return dY.rows > kFewRows && dY.columns >= kLeastTerms && multiplies(dY.dtype);
}

// The scale of every block; `buffer` has room for them where they are double-quantized.
const float* all_scales(const Weight4bit& w, float* buffer) {
  if (w.scales.absmax) return w.scales.absmax;
  parallel_for(ceil_div(w.blocks(), kChunk), grain(kChunk), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kChunk;
    stored_scales(w).decode(first, min(end * kChunk, w.blocks()) - first, buffer + first);
  });
  return buffer;
}

class Weight4bitDecoder {
 public:
  Weight4bitDecoder(const Weight4bit& w, const float* scales)
      : w_(w), scales_(scales), shift_(w.block_shift()), code_(w.format().codebook) {}

  BNB_INLINE void decode(Rectangle part, float* tile) const {
    const bool plain = w_.K % kLanes == 0 && part.columns == kTileColumns;
    for (int64_t i = 0; i < part.rows; i++, tile += kTileColumns) {
      const int64_t first = (part.row + i) * w_.K + part.column;
      __builtin_prefetch(w_.packed + (first + kRowsAhead * w_.K) / 2);
      if (plain) {
        for (int v = 0; v < kTileVectors; v += NibbleTable::Span::kVectors) {
          const auto span = code_.span(w_.packed + (first + v * kLanes) / 2);
          for (int i = 0; i < NibbleTable::Span::kVectors; i++) {
            const int64_t column = (v + i) * kLanes;
            store(tile + column, span.values[i] * scale(first + column));
          }
        }
      } else {
        decode_span(first, part.columns, tile);
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
  BNB_INLINE F32 values(I32 codes, int64_t element) const { return code_.table[codes] * scale(element); }
  BNB_INLINE F32 scale(int64_t element) const { return splat(scales_[element >> shift_]); }

  // Those of the last byte are followed by zeros.
  BNB_INLINE I32 codes(int64_t byte) const {
    if (byte + kLanes / 2 <= w_.bytes()) return load_nibbles(w_.packed + byte);
    uint8_t tail[kLanes / 2] = {};
    __builtin_memcpy(tail, w_.packed + byte, w_.bytes() - byte);
    return load_nibbles(tail);
  }

  const Weight4bit& w_;
  const float* const scales_;
  const int shift_;
  const NibbleTable code_;
};

class Int8Decoder {
 public:
  explicit Int8Decoder(const Int8Weight& w) : w_(w) {}

  BNB_INLINE void decode(Rectangle part, float* tile) const {
    for (int64_t i = 0; i < part.rows; i++, tile += kTileColumns) {
      const int8_t* const codes = w_.codes.data + (part.row + i) * w_.codes.columns + part.column;
      int8_dequantize(codes, w_.scales[part.row + i], part.columns, tile);
    }
  }

 private:
  const Int8Weight& w_;
};

// M rows of dY, widened. Some tiles of the result side by side share a part of dY that stays in L2.
template <class T, class Decoder>
void backward_rows(const float* dy, int64_t M, int64_t N, const Decoder& shared_decoder,
                   const Result<T>& dA) {
  const int64_t K = dA.stride;
  const int64_t across = ceil_div(K, kTileColumns);
  const int64_t block_rows = min(M, kBlockRows);
  const int64_t least = grain(block_rows * kTileColumns * N / 8);
  parallel_for(ceil_div(M, kBlockRows) * across, least, [&](int64_t begin, int64_t end) {
    const Decoder decoder = shared_decoder;
    const Buffer<float> part_of_dy(block_rows * kPartStride);
    const Buffer<float> tile(kTileDepth * kTileColumns);
    const Buffer<float> sums(kTilesAcross * block_rows * kTileColumns);
    __builtin_memset(tile.data(), 0, kTileDepth * kTileColumns * sizeof(float));
    for (int64_t part = begin; part < end;) {
      const int64_t row = part / across * kBlockRows, first_tile = part % across;
      const int64_t rows = min(kBlockRows, M - row);
      const int64_t tiles = min(kTilesAcross, min(end - part, across - first_tile));
      const auto sums_of = [&](int64_t t) { return sums.data() + t * rows * kTileColumns; };
      const auto column_of = [&](int64_t t) { return (first_tile + t) * kTileColumns; };
      const auto columns_of = [&](int64_t t) { return min(kTileColumns, K - column_of(t)); };
      __builtin_memset(sums.data(), 0, tiles * rows * kTileColumns * sizeof(float));
      for (int64_t n = 0; n < N; n += kTileDepth) {
        const int64_t depth = min(kTileDepth, N - n);
        copy_part(dy + row * N + n, rows, N, depth, part_of_dy.data());
        for (int64_t t = 0; t < tiles; t++) {
          decoder.decode({n, depth, column_of(t), columns_of(t)}, tile.data());
          multiply_part_with_tile(part_of_dy.data(), rows, tile.data(), depth, sums_of(t));
        }
      }
      for (int64_t t = 0; t < tiles; t++) {
        dA.finish(sums_of(t), kTileColumns, {row, rows, column_of(t), columns_of(t)});
      }
      part += tiles;
    }
  });
}

template <class Decoder>
void backward(const Matrix& dY, int64_t K, const Decoder& decoder, void* dA) {
  if (dY.rows == 0 || K == 0) return;
  const int64_t M = dY.rows, N = dY.columns;
  with_type(dY.dtype, dA, [&](auto* a) {
    constexpr int64_t most = kWidenedBlocks * kBlockRows;
    const auto* const y = same_type(dY.data, a);
    const Buffer<float> wide(sizeof(*a) == sizeof(float) ? 0 : min(M, most) * N);
    for (int64_t row = 0; row < M; row += most) {
      const int64_t rows = min(most, M - row);
      const Result<Pointee<decltype(a)>> result{nullptr, a + row * K, K};
      backward_rows(widened(y + row * N, rows * N, wide), rows, N, decoder, result);
    }
  });
}

void backward_of_4bit(const Matrix& dY, const Weight4bit& weight, void* dA) {
  const Buffer<float> buffer(weight.scales.absmax ? 0 : weight.blocks() + kLanes);
  const float* const scales = all_scales(weight, buffer.data());
  backward(dY, weight.K, Weight4bitDecoder(weight, scales), dA);
}

void backward_of_int8(const Matrix& dY, const Int8Weight& weight, void* dA) {
  backward(dY, weight.codes.columns, Int8Decoder(weight), dA);
}

}  // namespace
}  // namespace bnb::BNB_TARGET
