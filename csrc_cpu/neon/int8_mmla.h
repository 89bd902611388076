// int8 products by smmla, which multiplies 8 values of two rows with those of two others.
#pragma once

#include "int8.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int64_t kMmlaBytes = 8;              // of a row, in one instruction
constexpr int64_t kMmlaStep = 2 * kMmlaBytes;  // of a row, in one load
// Pairs of rows of A and of B: a tile of accumulators in registers, with what it is multiplied from.
constexpr int kMmlaPairs = 4, kMmlaColumnPairs = 3;

// Rows of A two and two: kMmlaBytes of the one, as many of the other, and so on. Zeros fill the last step,
// and stand for the last row of an odd number.
class RowPairs {
 public:
  explicit RowPairs(const Rows<int8_t>& A)
      : length_(2 * ceil_div(A.columns, kMmlaStep) * kMmlaStep), pairs_(ceil_div(A.rows, 2) * length_) {
    parallel_for(ceil_div(A.rows, 2), grain(2 * A.columns, kDecodedShare), [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; pair++) {
        for (int row = 0; row < 2; row++) {
          const bool exists = 2 * pair + row < A.rows;
          place(A.data + (2 * pair + row) * A.columns, exists ? A.columns : 0,
                pairs_.data() + pair * length_ + row * kMmlaBytes);
        }
      }
    });
  }
  const int8_t* pair(int64_t i) const { return pairs_.data() + i * length_; }

 private:
  void place(const int8_t* row, int64_t K, int8_t* out) const {
    for (int64_t k = 0; 2 * k < length_; k += kMmlaBytes, out += 2 * kMmlaBytes) {
      const int64_t there = max(min(K - k, kMmlaBytes), 0);
      if (there == kMmlaBytes) {
        __builtin_memcpy(out, row + k, kMmlaBytes);
      } else {
        __builtin_memset(out, 0, kMmlaBytes);
        if (there > 0) __builtin_memcpy(out, row + k, there);
      }
    }
  }

  int64_t length_;
  Buffer<int8_t> pairs_;
};

// Some products of pairs of rows with pairs of columns.
template <int pairs, int column_pairs>
struct MmlaTile {
  const int8_t* a[pairs];
  const int8_t* b[2 * column_pairs];
  int32x4_t sums[pairs][column_pairs];

  // kMmlaStep values of every row, from `k` on in A, and where `values` of a row of B gives them.
  template <class Values>
  BNB_INLINE void add(int64_t k, const Values& values) {
    int8x16_t y[2][column_pairs];
    for (int c = 0; c < column_pairs; c++) {
      const int64x2_t even = (int64x2_t)vld1q_s8(values(b[2 * c]));
      const int64x2_t odd = (int64x2_t)vld1q_s8(values(b[2 * c + 1]));
      y[0][c] = (int8x16_t)vzip1q_s64(even, odd);
      y[1][c] = (int8x16_t)vzip2q_s64(even, odd);
    }
    for (int half = 0; half < 2; half++) {
      for (int r = 0; r < pairs; r++) {
        const int8x16_t x = vld1q_s8(a[r] + 2 * k + half * kMmlaStep);
        for (int c = 0; c < column_pairs; c++) sums[r][c] = vmmlaq_s32(sums[r][c], x, y[half][c]);
      }
    }
  }

  void multiply(int64_t K) {
    int64_t k = 0;
    for (; k + kMmlaStep <= K; k += kMmlaStep) add(k, [&](const int8_t* row) { return row + k; });
    if (k == K) return;
    int8_t padded[kMmlaStep] = {};
    add(k, [&](const int8_t* row) {
      __builtin_memcpy(padded, row + k, K - k);
      return static_cast<const int8_t*>(padded);
    });
  }

  // The first rows and columns of the products.
  void write(int64_t rows, int64_t columns, int32_t* C, int64_t stride) const {
    for (int r = 0; r < pairs; r++) {
      for (int c = 0; c < column_pairs; c++) {
        int32_t products[4];
        vst1q_s32(products, sums[r][c]);
        for (int i = 0; i < 4; i++) {
          const int64_t row = 2 * r + i / 2, column = 2 * c + i % 2;
          if (row < rows && column < columns) C[row * stride + column] = products[i];
        }
      }
    }
  }
};

// Parts of A @ B^T.
class MmlaBlock {
 public:
  MmlaBlock(const Rows<int8_t>& A, const Rows<int8_t>& B) : A_(A), B_(B) {}

  void operator()(Rectangle part, int32_t* C, int64_t stride) const {
    const auto strip = [&](auto height, int64_t r) {
      constexpr int pairs = decltype(height)::value;
      for (int64_t c = 0; c < part.columns; c += 2 * kMmlaColumnPairs) {
        const int64_t columns = min(2 * kMmlaColumnPairs, part.columns - c);
        MmlaTile<pairs, kMmlaColumnPairs> tile{};
        for (int i = 0; i < pairs; i++) tile.a[i] = A_.pair((part.row + r) / 2 + i);
        for (int i = 0; i < 2 * kMmlaColumnPairs; i++) {
          tile.b[i] = B_.data + (part.column + min(c + i, part.columns - 1)) * B_.columns;
        }
        tile.multiply(B_.columns);
        tile.write(min(2 * pairs, part.rows - r), columns, C + r * stride + c, stride);
      }
    };
    int64_t r = 0;
    for (; r + 2 * kMmlaPairs <= part.rows; r += 2 * kMmlaPairs) strip(Constant<kMmlaPairs>{}, r);
    for (; r + 4 <= part.rows; r += 4) strip(Constant<2>{}, r);
    for (; r < part.rows; r += 2) strip(Constant<1>{}, r);
  }

 private:
  const RowPairs A_;
  const Rows<int8_t>& B_;
};

struct MmlaInt8 {
  // Of a single row half of the products would be wasted.
  static bool serves(const Rows<int8_t>& A) { return A.rows > 1; }

  static void run(const Rows<int8_t>& A, const Rows<int8_t>& B, int32_t* C) {
    int8_multiply(MmlaBlock(A, B), A, B, C);
  }
  static void run(const Int8Product& product, const Int8Outliers& outliers, const void* bias,
                  const Matrix& out) {
    int8_multiply_mixed(MmlaBlock(product.A, product.B), product, outliers, bias, out);
  }
};

}  // namespace
}  // namespace bnb::BNB_TARGET
