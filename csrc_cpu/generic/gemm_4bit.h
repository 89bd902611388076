// A @ dequantized(W)^T + bias from W as the checkpoint stores it (docs/SPEC.md section 3).
//
// W is decoded a tile at a time, transposed, so that vectors run along N and elements of A are broadcast:
// sums need no horizontal additions, and A is used as it lies in memory.
#pragma once

#include "gemv_4bit.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int kTileRows = 6;                            // of A: sums of kTileRows x kTileVectors in registers
constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;  // along N
constexpr int kTileColumns = kTileVectors * kLanes;     // rows of W
constexpr int kTileDepth = 128;                         // along K: a tile of W stays in L1
constexpr int64_t kTilesAcross = 4;
constexpr int64_t kBlockRows = 256;  // of A that a decoded tile is used for

// Decodes kTileColumns rows of W, the last one again where there are none left: tile f32[depth,
// kTileColumns].
class TileDecoder {
 public:
  TileDecoder(const Weight4bit& w, const float* code, const RowScales& scales, int64_t first)
      : w_(w), scales_(scales), first_(first), code_(code), words_aligned_(w.K % kWord == 0) {
    for (int column = 0; column < kTileColumns; column++) {
      const int64_t row = min(first + column, w.N - 1) - first;
      start_[column / kLanes][column % kLanes] = static_cast<int32_t>(row * w.K);
    }
  }

  void decode(int64_t k, int64_t depth, float* tile) const {
    for (int64_t word = 0; word < depth; word += kWord, tile += kWord * kTileColumns) {
      const int valid = static_cast<int>(min(kWord, depth - word));
      for (int v = 0; v < kTileVectors; v++) {
        if (words_aligned_) {
          decode_aligned(k + word, v, tile + v * kLanes);
        } else {
          decode_unaligned(k + word, valid, v, tile + v * kLanes);
        }
      }
    }
  }

 private:
  // A word lies in one block.
  BNB_INLINE void decode_aligned(int64_t k, int v, float* out) const {
    const int64_t first = first_ * w_.K + k;
    const GatheredWords words{gather_words(w_.packed + first / 2, start_[v] >> 1)};
    const F32 scale = scales_of(first, start_[v]);
    const auto values = code_(words);
    for (int i = 0; i < kWord; i++) store(out + i * kTileColumns, values[i ^ 1] * scale);
  }

  void decode_unaligned(int64_t k, int valid, int v, float* out) const {
    const int64_t first = first_ * w_.K + k;
    for (int i = 0; i < valid; i++) {
      I32 codes;
      for (int lane = 0; lane < kLanes; lane++) {
        const int64_t element = first + start_[v][lane] + i;
        codes[lane] = w_.packed[element / 2] >> (element % 2 ? 0 : 4);
      }
      store(out + i * kTileColumns, code_.table[codes] * scales_of(first + i, start_[v]));
    }
  }

  // Of the elements `first` + offsets.
  BNB_INLINE F32 scales_of(int64_t first, I32 offsets) const {
    const auto in_blocks = static_cast<int32_t>(first - (scales_.first_block << scales_.shift));
    return look_up(scales_.scales, (splat(in_blocks) + offsets) >> scales_.shift);
  }

  const Weight4bit& w_;
  const RowScales scales_;
  int64_t first_;
  NibbleTable code_;
  bool words_aligned_;
  I32 start_[kTileVectors];  // of each row, in elements from the first one's
};

// Rows of A, kTileDepth elements or fewer of each: side by side, as a row of W may be a power of two long,
// whose rows would share a few sets of the cache.
constexpr int64_t kPartStride = kTileDepth + kLanes;
void copy_part(const float* a, int64_t rows, int64_t stride, int64_t depth, float* part) {
  for (int64_t r = 0; r < rows; r++) {
    for_each_vector(depth, [&](int64_t k, auto lanes) {
      store(part + r * kPartStride + k, load(a + r * stride + k, lanes), lanes);
    });
  }
}

// Adds the products of `rows` rows of a part with a tile of W to sums f32[rows, kTileColumns].
template <int rows>
void multiply_tile(const float* part, const float* tile, int64_t depth, float* sums) {
  F32 partial[rows][kTileVectors] = {};
  for (int64_t k = 0; k < depth; k++) {
    F32 values[kTileVectors];
    for (int v = 0; v < kTileVectors; v++) values[v] = load(tile + k * kTileColumns + v * kLanes);
    for (int r = 0; r < rows; r++) {
      const F32 x = splat(part[r * kPartStride + k]);
      for (int v = 0; v < kTileVectors; v++) partial[r][v] = fma(x, values[v], partial[r][v]);
    }
  }
  for (int r = 0; r < rows; r++) {
    for (int v = 0; v < kTileVectors; v++) {
      float* sum = sums + r * kTileColumns + v * kLanes;
      store(sum, load(sum) + partial[r][v]);
    }
  }
}

void multiply_part_with_tile(const float* part, int64_t rows, const float* tile, int64_t depth, float* sums) {
  const auto strip = [&](auto height, int64_t r) {
    multiply_tile<decltype(height)::value>(part + r * kPartStride, tile, depth, sums + r * kTileColumns);
  };
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) strip(Constant<kTileRows>{}, r);
  for (; r + 4 <= rows; r += 4) strip(Constant<4>{}, r);
  for (; r + 2 <= rows; r += 2) strip(Constant<2>{}, r);
  for (; r < rows; r++) strip(Constant<1>{}, r);
}

// Up to kBlockRows rows of A, from `row` on and widened. Some tiles of W side by side share a part of A that
// stays in L2.
template <class T>
void multiply_block(const Gemm4bit<T>& gemm, const float* a, int64_t row, int64_t rows) {
  const Weight4bit& w = gemm.w;
  parallel_for(ceil_div(w.N, kTileColumns), 1, [&](int64_t begin, int64_t end) {
    const RowScalesReader scales_reader(w, kTilesAcross * kTileColumns);
    const Buffer<float> part(rows * kPartStride);
    const Buffer<float> tile(kTileDepth * kTileColumns);
    const Buffer<float> sums(kTilesAcross * kBlockRows * kTileColumns);
    const auto sums_of = [&](int64_t t) { return sums.data() + t * rows * kTileColumns; };
    for (int64_t first_tile = begin; first_tile < end; first_tile += kTilesAcross) {
      const int64_t tiles = min(kTilesAcross, end - first_tile);
      const int64_t first = first_tile * kTileColumns;
      const RowScales scales = scales_reader.read(first, min(tiles * kTileColumns, w.N - first));
      __builtin_memset(sums.data(), 0, tiles * rows * kTileColumns * sizeof(float));
      for (int64_t k = 0; k < w.K; k += kTileDepth) {
        const int64_t depth = min(kTileDepth, w.K - k);
        copy_part(a + k, rows, w.K, depth, part.data());
        for (int64_t t = 0; t < tiles; t++) {
          TileDecoder(w, gemm.code, scales, first + t * kTileColumns).decode(k, depth, tile.data());
          multiply_part_with_tile(part.data(), rows, tile.data(), depth, sums_of(t));
        }
      }
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t column = first + t * kTileColumns;
        gemm.result.finish(sums_of(t), kTileColumns, {row, rows, column, min(kTileColumns, w.N - column)});
      }
    }
  });
}

// Rows of A in f32, which they may be already; `buffer` has room for them.
const float* widened(const float* a, int64_t, const Buffer<float>&) { return a; }
template <class T>
const float* widened(const T* a, int64_t n, const Buffer<float>& buffer) {
  parallel_for(ceil_div(n, kChunk), grain(kChunk), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kChunk;
    for_each_vector(min(end * kChunk, n) - first, [&](int64_t i, auto lanes) {
      store(buffer.data() + first + i, load(a + first + i, lanes), lanes);
    });
  });
  return buffer.data();
}

template <class T>
void multiply_blocks(const Gemm4bit<T>& gemm) {
  const int64_t M = gemm.M, K = gemm.w.K;
  const Buffer<float> buffer(sizeof(T) == sizeof(float) ? 0 : min(M, kBlockRows) * K);
  for (int64_t row = 0; row < M; row += kBlockRows) {
    const int64_t rows = min(M - row, kBlockRows);
    multiply_block(gemm, widened(gemm.a + row * K, rows * K, buffer), row, rows);
  }
}

void multiply_4bit(const Matrix& A, const Weight4bit& weight, const float* code,
                   const Destination& destination) {
  with_type(A.dtype, destination.out, [&](auto* y) {
    using T = Pointee<decltype(y)>;
    const Gemm4bit<T> gemm{A.as<const T>(), A.rows, weight, code, destination.result<T>(0)};
    if (gemm.M <= FloatProducts::kMostRows) return gemv_4bit<FloatProducts>(gemm);
    multiply_blocks(gemm);
  });
}

void gemm_4bit_of_code(const Matrix& A, const Weight4bit& weight, const float* code, const void* bias,
                       void* out) {
  multiply_4bit(A, weight, code, {bias, out, weight.N});
}

}  // namespace
}  // namespace bnb::BNB_TARGET
