// int8 products on tiles: the weight's rows are used where they lie.
#pragma once

#include "../avx512_vnni/int8.h"
#include "tiles.h"

namespace bnb::BNB_TARGET {
namespace {

// Calls finish(part, sums) for blocks of A @ B^T, and before that open(n, count) for their rows of B, which
// then stay in the cache.
template <class Open, class Finish>
void multiply_int8_tiles(const Rows<int8_t>& A, const Rows<int8_t>& B, const Open& open,
                         const Finish& finish) {
  const int64_t K = A.columns;
  const RearrangedX x(A.data, A.rows, K / 4);
  const auto rows_of_B = [&](int64_t n, int64_t count, uint8_t* buffer) -> const uint8_t* {
    open(n, count);
    const auto* rows = reinterpret_cast<const uint8_t*>(B.data + n * K);
    const int64_t padding = -count & (kPanelRows - 1);
    if (padding == 0) return rows;
    __builtin_memcpy(buffer, rows, count * K);
    __builtin_memset(buffer + count * K, 0, padding * K);
    return buffer;
  };
  multiply_tiles<Int8Dot>(x, A.rows, B.rows, K, rows_of_B, finish);
}

// Outliers for bf16: their products are taken on tiles too, exactly, since a code fits in bf16. B's scale is
// applied to the sums.
class TileOutliers {
 public:
  TileOutliers(const BFloat16* X, const Int8Product& product, const ColumnList& list)
      : count_(list.count()),
        row_length_(ceil_div(count_, kStep) * kStep),
        codes_(product.B, list, row_length_),
        col_stats_(product.col_stats),
        x_(product.A.rows, row_length_ / 2, Constant<kTileSide>{},
           [&](int64_t row, int rows, int64_t word, uint32_t* scratch) {
             auto* out = reinterpret_cast<BFloat16*>(scratch);
             for (int r = 0; r < rows; r++, out += kStep) {
               gather(X + (row + r) * product.A.columns, list.data() + 2 * word,
                      min(count_ - 2 * word, kStep), out);
             }
             return RowWords{scratch, kTileSide};
           }),
        b_(ceil_div(product.B.rows, kPanelRows) * kPanelRows * row_length_) {
    const int64_t N = product.B.rows;
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

  // products[rows, kStride] of a part of the result.
  void multiply(Rectangle part, float* products) const {
    const auto* b = reinterpret_cast<const uint8_t*>(b_.data() + part.column * row_length_);
    const int64_t row_bytes = row_length_ * sizeof(BFloat16);
    alignas(64) uint32_t sums[kPanelRows * kPanelRows];
    multiply_panel<BFloat16Dot>(b, row_bytes, x_, part.row, part.rows, sums);
    for_each_vector(part.columns, [&](int64_t n, auto lanes) {
      const F32 scale = load(col_stats_ + part.column + n, lanes) / splat(127.0f);
      for (int64_t r = 0; r < part.rows; r++) {
        const auto* sum = reinterpret_cast<const float*>(sums + r * kPanelRows + n);
        store(products + r * kStride + n, load(sum, lanes) * scale * splat(kCodeScale), lanes);
      }
    });
  }

 private:
  static constexpr int64_t kStep = BFloat16Dot::kStep;
  // Codes are below 1 by it, and no sum overflows that the result does not.
  static constexpr float kCodeScale = 128;

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
Outliers<T> outliers_on_tiles(const T* X, const Int8Product& product, const ColumnList& list) {
  return {X, product, list};
}
TileOutliers outliers_on_tiles(const BFloat16* X, const Int8Product& product, const ColumnList& list) {
  return {X, product, list};
}

struct TileInt8 {
  // Tiles pay with a whole number of steps along K, and enough rows to fill one.
  static bool serves(const Rows<int8_t>& A) { return A.columns % Int8Dot::kStep == 0 && A.rows >= kTileSide; }

  static void run(const Rows<int8_t>& A, const Rows<int8_t>& B, int32_t* C) {
    const auto finish = [&](Rectangle part, const uint32_t* sums) {
      for (int64_t r = 0; r < part.rows; r++) {
        int32_t* const row = C + (part.row + r) * B.rows + part.column;
        __builtin_memcpy(row, sums + r * kPanelRows, part.columns * sizeof(int32_t));
      }
    };
    multiply_int8_tiles(A, B, [](int64_t, int64_t) {}, finish);
  }

  static void run(const Int8Product& product, const Int8Outliers& outliers, const void* bias,
                  const Matrix& out) {
    const ColumnList list(outliers.columns, product.A.columns);
    with_int8_result(product, outliers, bias, out, [&](const auto& result, const auto* X) {
      const auto apart = outliers_on_tiles(X, product, list);
      multiply_int8_tiles(
          product.A, product.B, [&](int64_t n, int64_t count) { apart.open(n, count); },
          [&](Rectangle part, const uint32_t* sums) {
            result.finish(reinterpret_cast<const int32_t*>(sums), kPanelRows, part, apart);
          });
    });
  }
};

}  // namespace
}  // namespace bnb::BNB_TARGET
