// The outlier columns of LLM.int8(), which are multiplied in full precision (docs/SPEC.md section 4).
#pragma once

#include "common.h"

namespace bnb::BNB_TARGET {
namespace {

// Tiles of the result whose rows of A and B stay in cache.
constexpr int64_t kInt8BlockRows = 64;
constexpr int64_t kInt8BlockColumns = 48;

// What codes stand for.
BNB_INLINE F32 int8_value(I32 codes, F32 scale) { return to_float(codes) * scale / splat(127.0f); }

// The columns that are marked, ascending.
class ColumnList {
 public:
  ColumnList(const uint8_t* marked, int64_t K) : columns_(marked ? K : 0) {
    constexpr int64_t kWord = sizeof(uint64_t);
    for (int64_t k = 0; marked && k < K; k += kWord) {
      uint64_t any = 0;
      __builtin_memcpy(&any, marked + k, min(kWord, K - k));
      if (any == 0) continue;
      for (int64_t i = k; i < min(k + kWord, K); i++) {
        if (marked[i]) columns_.data()[count_++] = i;
      }
    }
  }
  const int64_t* data() const { return columns_.data(); }
  int64_t count() const { return count_; }

 private:
  Buffer<int64_t> columns_;
  int64_t count_ = 0;
};

// The outlier columns of X [M, K] and of the dequantized B [N, K], gathered for a product in full precision.
// Where every row of B is used for one block only, it is gathered then, while it is in the cache.
template <class T>
class Outliers {
 public:
  Outliers(const T* X, const Int8Product& product, const ColumnList& list)
      : B_(product.B.data),
        N_(product.B.rows),
        K_(product.B.columns),
        col_stats_(product.col_stats),
        columns_(list.data()),
        count_(list.count()),
        gathers_late_(product.A.rows <= kInt8BlockRows),
        x_(product.A.rows * count_),
        b_(count_ * N_) {
    if (count_ == 0) return;
    parallel_for(product.A.rows, grain(count_), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        for (int64_t j = 0; j < count_; j++) x_.data()[r * count_ + j] = load(X + r * K_ + columns_[j], 1)[0];
      }
    });
    if (gathers_late_) return;
    parallel_for(ceil_div(N_, kLanes), grain(count_ * kLanes), [&](int64_t begin, int64_t end) {
      gather_rows(begin * kLanes, min(end * kLanes, N_) - begin * kLanes);
    });
  }

  // Nothing is left to do for rows of B before their products.
  void open(int64_t, int64_t) const {}

  // products[rows, kStride] of a part of the result.
  void multiply(Rectangle part, float* products) const {
    if (gathers_late_) gather_rows(part.column, part.columns);
    int64_t r = 0;
    for (; r + kRows <= part.rows; r += kRows) strip<kRows>(part, r, products + r * kStride);
    for (; r < part.rows; r++) strip<1>(part, r, products + r * kStride);
  }
  bool empty() const { return count_ == 0; }

  static constexpr int64_t kStride = kInt8BlockColumns;

 private:
  static constexpr int kRows = kRegisters / 4;

  void gather_rows(int64_t first, int64_t rows) const {
    for_each_vector(rows, [&](int64_t i, auto lanes) {
      const int64_t n = first + i;
      const int64_t valid = min(N_ - n, kLanes);
      const F32 scale = load(col_stats_ + n, lanes);
      for (int64_t j = 0; j < count_; j++) {
        int8_t codes[kLanes] = {};
        for (int64_t c = 0; c < valid; c++) codes[c] = B_[(n + c) * K_ + columns_[j]];
        store(b_.data() + j * N_ + n, int8_value(load(codes), scale), lanes);
      }
    });
  }

  // Rows from the r-th of a part on.
  template <int rows>
  void strip(Rectangle part, int64_t r, float* products) const {
    const float* const x = x_.data() + (part.row + r) * count_;
    const float* const b = b_.data() + part.column;
    int64_t n = 0;
    for (; n + 2 * kLanes <= part.columns; n += 2 * kLanes) tile<rows, 2>(x, b + n, products + n, AllLanes{});
    for_each_vector(part.columns - n,
                    [&](int64_t i, auto lanes) { tile<rows, 1>(x, b + n + i, products + n + i, lanes); });
  }

  template <int rows, int vectors, class Lanes>
  void tile(const float* x, const float* b, float* products, Lanes lanes) const {
    F32 sums[rows][vectors] = {};
    for (int64_t j = 0; j < count_; j++) {
      F32 values[vectors];
      for (int v = 0; v < vectors; v++) values[v] = load(b + j * N_ + v * kLanes, lanes);
      for (int r = 0; r < rows; r++) {
        const F32 scalar = splat(x[r * count_ + j]);
        for (int v = 0; v < vectors; v++) sums[r][v] = fma(scalar, values[v], sums[r][v]);
      }
    }
    for (int r = 0; r < rows; r++) {
      for (int v = 0; v < vectors; v++) store(products + r * kStride + v * kLanes, sums[r][v], lanes);
    }
  }

  const int8_t* B_;
  int64_t N_, K_;
  const float* col_stats_;
  const int64_t* columns_;
  int64_t count_;
  bool gathers_late_;
  Buffer<float> x_, b_;
};

constexpr int64_t kGatheredBytes = 4;

// The codes of a row of B in the columns of a list, kLanes at a time; behind the list's end follow codes of
// no meaning. K is kGatheredBytes or more.
class ColumnCodes {
 public:
  ColumnCodes(const Rows<int8_t>& B, const ColumnList& list, int64_t padded)
      : B_(reinterpret_cast<const uint8_t*>(B.data)), K_(B.columns), places_(padded), shifts_(padded) {
    for (int64_t j = 0; j < padded; j++) {
      const int64_t column = j < list.count() ? list.data()[j] : 0;
      const int64_t place = min(column, K_ - kGatheredBytes);
      places_.data()[j] = static_cast<int32_t>(place);
      shifts_.data()[j] = static_cast<int32_t>(8 * (kGatheredBytes - 1 - (column - place)));
    }
  }

  // The byte that is wanted moves to the top of its word, and back.
  BNB_INLINE F32 read(int64_t n, int64_t j) const {
    const I32 words = gather_words(B_ + n * K_, load(places_.data() + j));
    return to_float(words << load(shifts_.data() + j) >> 24);
  }

 private:
  const uint8_t* B_;
  int64_t K_;
  Buffer<int32_t> places_, shifts_;
};

constexpr int64_t kFewRows = 4;

// Outliers for a few rows of X: B is read where it lies, row by row.
class OutliersOfFewRows {
 public:
  template <class T>
  OutliersOfFewRows(const T* X, const Int8Product& product, const ColumnList& list)
      : padded_(ceil_div(list.count(), kLanes) * kLanes),
        codes_(product.B, list, padded_),
        col_stats_(product.col_stats),
        x_(product.A.rows * padded_) {
    for (int64_t r = 0; r < product.A.rows; r++) {
      float* const x = x_.data() + r * padded_;
      const T* const row = X + r * product.A.columns;
      for (int64_t j = 0; j < padded_; j++) x[j] = j < list.count() ? load(row + list.data()[j], 1)[0] : 0;
    }
  }

  void multiply(Rectangle part, float* products) const {
    for (int64_t n = 0; n < part.columns; n++) {
      F32 sums[kFewRows] = {};
      const F32 scale = splat(col_stats_[part.column + n] / 127.0f);
      for (int64_t j = 0; j < padded_; j += kLanes) {
        const F32 values = codes_.read(part.column + n, j) * scale;
        for (int64_t r = 0; r < part.rows; r++) {
          sums[r] = fma(values, load(x_.data() + (part.row + r) * padded_ + j), sums[r]);
        }
      }
      for (int64_t r = 0; r < part.rows; r++) products[r * kStride + n] = reduce_add(sums[r]);
    }
  }
  bool empty() const { return padded_ == 0; }

  static constexpr int64_t kStride = kInt8BlockColumns;

 private:
  int64_t padded_;
  ColumnCodes codes_;
  const float* col_stats_;
  Buffer<float> x_;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
