// int8 products on tiles: the weight's rows are used where they lie.
#pragma once

#include "../avx512_vnni/int8.h"
#include "tiles.h"

namespace bnb::BNB_TARGET {
namespace {

// Whether tiles pay: with a whole number of steps along K, and enough rows to fill one.
bool fits_int8_tiles(int64_t M, int64_t K) { return K % Int8Dot::kStep == 0 && M >= kTileSide; }

// Calls finish(row, rows, column, columns, sums) for blocks of A @ B^T, and before that open(n, count) for
// their rows of B, which then stay in the cache.
template <class Open, class Finish>
void multiply_int8_tiles(const int8_t* A, const int8_t* B, int64_t M, int64_t N, int64_t K, const Open& open,
                         const Finish& finish) {
  const RearrangedX x(A, M, K / 4);
  const auto rows_of_B = [&](int64_t n, int64_t count, uint8_t* buffer) -> const uint8_t* {
    open(n, count);
    const auto* rows = reinterpret_cast<const uint8_t*>(B + n * K);
    const int64_t padding = -count & (kPanelRows - 1);
    if (padding == 0) return rows;
    __builtin_memcpy(buffer, rows, count * K);
    __builtin_memset(buffer + count * K, 0, padding * K);
    return buffer;
  };
  multiply_tiles<Int8Dot>(x, M, N, K, rows_of_B, finish);
}

void int8_linear_matmul_amx(const int8_t* A, const int8_t* B, int64_t M, int64_t N, int64_t K, int32_t* C,
                            Stream stream) {
  if (!fits_int8_tiles(M, K)) return int8_linear_matmul<VnniDot>(A, B, M, N, K, C, stream);
  const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t width, const uint32_t* sums) {
    for (int64_t r = 0; r < rows; r++) {
      __builtin_memcpy(C + (row + r) * N + column, sums + r * kPanelRows, width * sizeof(int32_t));
    }
  };
  multiply_int8_tiles(A, B, M, N, K, [](int64_t, int64_t) {}, finish);
}

// Outliers for bf16: their products are taken on tiles too, exactly, since a code fits in bf16. B's scale is
// applied to the sums.
class TileOutliers {
 public:
  TileOutliers(const BFloat16* X, int64_t M, const int8_t* B, int64_t N, int64_t K, const float* col_stats,
               const ColumnList& list)
      : count_(list.count()),
        row_length_(ceil_div(count_, kStep) * kStep),
        codes_(B, K, list, row_length_),
        col_stats_(col_stats),
        x_(M, row_length_ / 2, Constant<kTileSide>{},
           [&](int64_t row, int rows, int64_t word, uint32_t* scratch) {
             auto* out = reinterpret_cast<BFloat16*>(scratch);
             for (int r = 0; r < rows; r++, out += kStep) {
               gather(X + (row + r) * K, list.data() + 2 * word, min(count_ - 2 * word, kStep), out);
             }
             return RowWords{scratch, kTileSide};
           }),
        b_(ceil_div(N, kPanelRows) * kPanelRows * row_length_) {
    const int64_t padding = -N & (kPanelRows - 1);
    __builtin_memset(b_.data() + N * row_length_, 0, padding * row_length_ * sizeof(BFloat16));
  }

  // Gathers rows [first, first + rows) of B.
  void open(int64_t first, int64_t rows) const {
    for (int64_t n = first; n < first + rows; n++) {
      for (int64_t j = 0; j < row_length_; j += kLanes) {
        store(b_.data() + n * row_length_ + j, codes_.read(n, j) * splat(1 / kCodeScale));
      }
    }
  }

  bool empty() const { return count_ == 0; }

  static constexpr int64_t kStride = kPanelRows;

  // products[rows, kStride]: of `rows` rows of X with `width` rows of B.
  void multiply(int64_t row, int64_t rows, int64_t column, int64_t width, float* products) const {
    const auto* b = reinterpret_cast<const uint8_t*>(b_.data() + column * row_length_);
    const int64_t row_bytes = row_length_ * sizeof(BFloat16);
    alignas(64) uint32_t sums[kPanelRows * kPanelRows];
    if (rows > kTileSide) {
      multiply_panel<BFloat16Dot, 2>(b, row_bytes, x_, row / kTileSide, sums);
    } else {
      multiply_panel<BFloat16Dot, 1>(b, row_bytes, x_, row / kTileSide, sums);
    }
    for_each_vector(width, [&](int64_t n, auto lanes) {
      const F32 scale = load(col_stats_ + column + n, lanes) / splat(127.0f);
      for (int64_t r = 0; r < rows; r++) {
        const auto* sum = reinterpret_cast<const float*>(sums + r * kPanelRows + n);
        store(products + r * kStride + n, load(sum, lanes) * scale * splat(kCodeScale), lanes);
      }
    });
  }

 private:
  static constexpr int64_t kStep = BFloat16Dot::kStep;
  static constexpr float kCodeScale =
      128;  // codes are below 1 by it, and no sum overflows that the result does not

  static void gather(const BFloat16* x, const int64_t* columns, int64_t count, BFloat16* out) {
    for (int64_t j = 0; j < count; j++) out[j] = x[columns[j]];
    for (int64_t j = count; j < kStep; j++) out[j] = {0};
  }

  int64_t count_, row_length_;
  ColumnCodes codes_;
  const float* col_stats_;
  RearrangedX x_;
  Buffer<BFloat16> b_;
};

template <class T>
struct OutliersOnTiles {
  using type = Outliers<T>;
};
template <>
struct OutliersOnTiles<BFloat16> {
  using type = TileOutliers;
};

void int8_mixed_scaled_mm_amx(const int8_t* A, const int8_t* B, int64_t M, int64_t N, int64_t K,
                              const int32_t* C, const float* row_stats, const float* col_stats, const void* X,
                              const uint8_t* outlier_columns, const void* bias, void* out, DType dtype,
                              Stream stream) {
  if (!fits_int8_tiles(M, K)) {
    return int8_mixed_scaled_mm<VnniDot>(A, B, M, N, K, C, row_stats, col_stats, X, outlier_columns, bias,
                                         out, dtype, stream);
  }
  const ColumnList list(outlier_columns, K);
  with_type(dtype, out, [&](auto* y) {
    const typename OutliersOnTiles<Pointee<decltype(y)>>::type apart(same_type(X, y), M, B, N, K, col_stats,
                                                                     list);
    multiply_int8_tiles(
        A, B, M, N, K, [&](int64_t n, int64_t count) { apart.open(n, count); },
        [&](int64_t row, int64_t rows, int64_t column, int64_t width, const uint32_t* sums) {
          int8_finish_block(reinterpret_cast<const int32_t*>(sums), kPanelRows, row, rows, column, width,
                            row_stats, col_stats, apart, same_type(bias, y), y, N);
        });
  });
}

}  // namespace
}  // namespace bnb::BNB_TARGET
