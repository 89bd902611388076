// LLM.int8() (docs/SPEC.md section 4).
#pragma once

#include "int8_outliers.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr float kNoThreshold = __builtin_nanf("");  // no comparison with it holds

// What an entry adds to its row's or column's absmax, as bits: nothing if it is an outlier.
BNB_INLINE I32 inlier_bits(F32 x, F32 threshold) {
  const F32 magnitude = abs(x);
  return select(less_equal(threshold, magnitude), I32{}, bits(magnitude));
}

// Entries are multiplied by 127 / absmax, or by 0 where that or absmax is not finite.
BNB_INLINE F32 int8_scale(F32 absmax) {
  const F32 scale = splat(127.0f) / absmax;
  const I32 infinity = splat(kInfinity);
  const Mask finite = less(bits(scale), infinity);
  return select(finite, select(less(bits(absmax), infinity), scale, F32{}), F32{});
}

// The statistic to keep: 0 where 127 / absmax overflows.
BNB_INLINE F32 int8_statistic(F32 absmax) {
  return select(equal(bits(splat(127.0f) / absmax), splat(kInfinity)), F32{}, absmax);
}

// Where `scale` is 0 the code is 0, whatever x is.
BNB_INLINE I32 int8_code(F32 x, F32 scale) {
  F32 scaled = x * scale;
  scaled = select(less(scaled, splat(-127.0f)), splat(-127.0f), scaled);
  scaled = select(less(splat(127.0f), scaled), splat(127.0f), scaled);
  return round_to_int(select(equal(scale, F32{}), F32{}, scaled));
}

BNB_INLINE F32 canonical_nan(F32 x) { return select(equal(x, x), x, splat(float_from_bits(kNan))); }

// `outlier_columns` belongs to this thread; null where there is no threshold.
template <class T>
float row_absmax(const T* a, int64_t K, F32 threshold, uint8_t* outlier_columns) {
  I32 largest{};
  for_each_vector(K, [&](int64_t k, auto lanes) {
    const F32 x = load(a + k, lanes);
    largest = max(largest, inlier_bits(x, threshold));
    if (!outlier_columns) return;
    const I32 outliers = select(less_equal(threshold, abs(x)), splat(1), I32{});
    store(outlier_columns + k, load(outlier_columns + k, lanes) | outliers, lanes);
  });
  return float_from_bits(reduce_max(largest));
}

// Adds the columns that one thread found to those of all.
void merge_outlier_columns(const uint8_t* found, int64_t K, uint8_t* outlier_columns) {
  for (int64_t k = 0; k < K; k++) {
    if (found[k]) __atomic_store_n(outlier_columns + k, uint8_t{1}, __ATOMIC_RELAXED);
  }
}

template <class T>
void int8_quantize_row(const T* a, int64_t K, F32 scale, const uint8_t* outlier_columns, int8_t* q) {
  uint8_t* codes = reinterpret_cast<uint8_t*>(q);
  for_each_vector(K, [&](int64_t k, auto lanes) {
    I32 code = int8_code(load(a + k, lanes), scale);
    if (outlier_columns) code = select(equal(load(outlier_columns + k, lanes), I32{}), code, I32{});
    store(codes + k, code, lanes);
  });
}

void int8_vectorwise_quant(const Matrix& A, float threshold, int8_t* q, float* row_stats,
                           uint8_t* outlier_columns, Stream) {
  const int64_t M = A.rows, K = A.columns;
  const F32 limit = splat(threshold > 0 ? threshold : kNoThreshold);
  uint8_t* const outliers = threshold > 0 ? outlier_columns : nullptr;
  if (outliers) __builtin_memset(outliers, 0, K);
  with_type(A, [&](const auto* a) {
    const auto measure = [&](int64_t begin, int64_t end) {
      const Buffer<uint8_t> found(K);
      __builtin_memset(found.data(), 0, K);
      for (int64_t r = begin; r < end; r++) {
        row_stats[r] = row_absmax(a + r * K, K, limit, outliers ? found.data() : nullptr);
      }
      if (outliers) merge_outlier_columns(found.data(), K, outliers);
    };
    const auto quantize = [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const F32 absmax = splat(row_stats[r]);
        int8_quantize_row(a + r * K, K, int8_scale(absmax), outliers, q + r * K);
        row_stats[r] = canonical_nan(int8_statistic(absmax))[0];
      }
    };
    // Every outlier column must be known before the first row is quantized.
    parallel_for(M, grain(K, kDecodedShare), measure);
    parallel_for(M, grain(K, kDecodedShare), quantize);
  });
}

constexpr int64_t kStrip = 256;

// A matrix that is quantized down its columns, up to kStrip of them at a time.
template <class T>
struct ColumnwiseQuant {
  const T* a;
  int64_t M, K;
  float threshold;
  const uint8_t* outlier_columns;  // null: none
  int8_t* q;
  float* col_stats;

  void quantize(int64_t first, int64_t columns) const {
    F32 scales[kStrip / kLanes];
    measure(first, columns, scales);
    for (int64_t r = 0; r < M; r++) {
      const T* const row = a + r * K + first;
      uint8_t* const codes = reinterpret_cast<uint8_t*>(q) + r * K + first;
      for_each_vector(columns, [&](int64_t k, auto lanes) {
        store(codes + k, int8_code(load(row + k, lanes), scales[k / kLanes]), lanes);
      });
    }
  }

 private:
  void measure(int64_t first, int64_t columns, F32* scales) const {
    I32 largest[kStrip / kLanes] = {};
    const F32 limit = splat(threshold);
    for (int64_t r = 0; r < M; r++) {
      const T* const row = a + r * K + first;
      for_each_vector(columns, [&](int64_t k, auto lanes) {
        I32& column = largest[k / kLanes];
        column = max(column, inlier_bits(load(row + k, lanes), limit));
      });
    }
    for_each_vector(columns, [&](int64_t k, auto lanes) {
      const F32 absmax = from_bits(largest[k / kLanes]);
      F32 scale = int8_scale(absmax);
      if (outlier_columns) {
        scale = select(equal(load(outlier_columns + first + k, lanes), I32{}), scale, F32{});
      }
      scales[k / kLanes] = scale;
      store(col_stats + first + k, canonical_nan(int8_statistic(absmax)), lanes);
    });
  }
};

void int8_columnwise_quant(const Matrix& A, float threshold, int8_t* q, float* col_stats,
                           const uint8_t* outlier_columns, Stream) {
  const int64_t M = A.rows, K = A.columns;
  const bool limited = threshold > 0;
  with_type(A, [&](auto* a) {
    const ColumnwiseQuant<Pointee<decltype(a)>> quant{
        a, M, K, limited ? threshold : kNoThreshold, limited ? outlier_columns : nullptr, q, col_stats};
    parallel_for(ceil_div(K, kStrip), grain(kStrip * M), [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * kStrip; first < min(end * kStrip, K); first += kStrip) {
        quant.quantize(first, min(kStrip, K - first));
      }
    });
  });
}

// `count` codes that share a scale.
template <class T>
void int8_dequantize(const int8_t* codes, float scale, int64_t count, T* out) {
  for_each_vector(count, [&](int64_t i, auto lanes) {
    store(out + i, int8_value(load(codes + i, lanes), splat(scale)), lanes);
  });
}

void int8_vectorwise_dequant(const Int8Weight& weight, const Matrix& out, Stream) {
  const int64_t K = weight.codes.columns;
  with_type(out, [&](auto* y) {
    parallel_for(weight.codes.rows, grain(K), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        int8_dequantize(weight.codes.data + r * K, weight.scales[r], K, y + r * K);
      }
    });
  });
}

constexpr int kInt8Rows = kRegisters == 32 ? 4 : 2;  // of a tile of accumulators in registers
constexpr int kInt8Columns = kRegisters == 32 ? 4 : 3;
constexpr int64_t kInt8PrefetchBytes = 2048;

// How a step of dot products is taken is a class of its own, Dot below: generic/pairs_dot.h, or one with
// instructions for it. An instruction may want its right operand raised by kOffset; the product of the offset
// and the left operand's sum is then taken off again.

// Calls step(load_left, load_right) for every step of a row, the last one padded with zeros. load_right also
// fetches what is `ahead` bytes further, unless that is 0.
template <class Dot, class Step>
BNB_INLINE void for_each_int8_step(int64_t K, const Step& step) {
  int64_t k = 0;
  for (; k + Dot::kStep <= K; k += Dot::kStep) {
    step([&](const int8_t* p) { return Dot::left(p + k); },
         [&](const int8_t* p, int64_t ahead = 0) {
           if (ahead) __builtin_prefetch(p + k + ahead);
           return Dot::right(p + k);
         });
  }
  if (k == K) return;
  int8_t padded[Dot::kStep] = {};
  const auto pad = [&](const int8_t* p) {
    __builtin_memcpy(padded, p + k, K - k);
    return padded;
  };
  step([&](const int8_t* p) { return Dot::left(pad(p)); },
       [&](const int8_t* p, int64_t = 0) { return Dot::right(pad(p)); });
}

// Dot products of rows of A with rows of B, which lie `apart` rows from each other; `excess` is what Dot's
// offset adds in each row.
template <class Dot, int rows, int columns>
void int8_tile(const int8_t* const* a, const int8_t* B, int64_t apart, int64_t K, const int32_t* excess,
               int32_t* C, int64_t stride) {
  const int8_t* b[columns];
  for (int c = 0; c < columns; c++) b[c] = B + c * apart * K;
  I32 sums[rows][columns] = {};
  for_each_int8_step<Dot>(K, [&](const auto& left, const auto& right) {
    typename Dot::Vector values[columns];
    // One row of A leaves nothing else to do while B comes from memory.
    for (int c = 0; c < columns; c++) values[c] = right(b[c], rows == 1 ? kInt8PrefetchBytes : 0);
    for (int r = 0; r < rows; r++) {
      const typename Dot::Vector x = left(a[r]);
      for (int c = 0; c < columns; c++) sums[r][c] = Dot::add(sums[r][c], x, values[c]);
    }
  });
  int32_t reduced[rows][columns];
  if constexpr (rows * columns == kLanes) {
    const I32 all = reduce_adds(reinterpret_cast<const I32(&)[kLanes]>(sums));
    __builtin_memcpy(reduced, &all, sizeof reduced);
  } else {
    for (int r = 0; r < rows; r++) {
      for (int c = 0; c < columns; c++) reduced[r][c] = reduce_add(sums[r][c]);
    }
  }
  for (int r = 0; r < rows; r++) {
    for (int c = 0; c < columns; c++) C[r * stride + c * apart] = reduced[r][c] - excess[r];
  }
}

// What Dot's offset adds to products with one row of A: products with a row of zeros.
template <class Dot>
int32_t int8_excess(const int8_t* a, int64_t K) {
  if (Dot::kOffset == 0) return 0;
  const int8_t zeros[Dot::kStep] = {};
  const typename Dot::Vector offset = Dot::right(zeros);
  I32 sum{};
  for_each_int8_step<Dot>(K, [&](const auto& left, const auto&) { sum = Dot::add(sum, left(a), offset); });
  return reduce_add(sum);
}

// C[rows, stride] of a part of A @ B^T: register tiles, at the edges narrower ones.
template <class Dot>
void int8_block(const Rows<int8_t>& A, const Rows<int8_t>& B, Rectangle part, int32_t* C, int64_t stride) {
  const int64_t K = A.columns;
  const int8_t* const first_a = A.data + part.row * K;
  const int8_t* const first_b = B.data + part.column * K;
  int32_t excess[kInt8BlockRows];
  for (int64_t r = 0; r < part.rows; r++) excess[r] = int8_excess<Dot>(first_a + r * K, K);
  const auto strip = [&](auto tile_rows, int64_t r) {
    constexpr int height = decltype(tile_rows)::value;
    const int8_t* a[height];
    for (int i = 0; i < height; i++) a[i] = first_a + (r + i) * K;
    // One row of A reads B once. Each column of a tile then has a part of B of its own from front to back:
    // few long streams are what memory delivers fastest.
    const int64_t tiles = part.columns / kInt8Columns;
    const int64_t apart = height == 1 ? tiles : 1;
    int32_t* const row = C + r * stride;
    for (int64_t i = 0; i < tiles; i++) {
      const int64_t c = height == 1 ? i : i * kInt8Columns;
      int8_tile<Dot, height, kInt8Columns>(a, first_b + c * K, apart, K, excess + r, row + c, stride);
    }
    for (int64_t c = tiles * kInt8Columns; c < part.columns; c++) {
      int8_tile<Dot, height, 1>(a, first_b + c * K, 1, K, excess + r, row + c, stride);
    }
  };
  int64_t r = 0;
  for (; r + kInt8Rows <= part.rows; r += kInt8Rows) strip(Constant<kInt8Rows>{}, r);
  for (; r < part.rows; r++) strip(Constant<1>{}, r);
}

// Calls body(part) for every block of A @ B^T.
template <class Body>
void for_each_int8_block(const Rows<int8_t>& A, const Rows<int8_t>& B, const Body& body) {
  const int64_t M = A.rows, N = B.rows;
  const int64_t across = ceil_div(N, kInt8BlockColumns);
  const int64_t work = min(M, kInt8BlockRows) * kInt8BlockColumns * A.columns;
  parallel_for(ceil_div(M, kInt8BlockRows) * across, grain(work / 8), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = i / across * kInt8BlockRows;
      const int64_t column = i % across * kInt8BlockColumns;
      body(Rectangle{row, min(kInt8BlockRows, M - row), column, min(kInt8BlockColumns, N - column)});
    }
  });
}

// What integer products become: C * (row_stats / 127^2) * col_stats + bias + extra, rounded once.
template <class T>
struct Int8Result {
  const float *row_stats, *col_stats;
  const T* bias;  // null: none
  T* out;
  int64_t N;

  // A part of a row; `extra` may be null.
  void finish_row(const int32_t* C, const float* extra, int64_t row, int64_t column, int64_t columns) const {
    const F32 row_scale = splat(row_stats[row] / 16129.0f);
    T* const place = out + row * N;
    for_each_vector(columns, [&](int64_t i, auto lanes) {
      const int64_t n = column + i;
      F32 y = to_float(load(C + i, lanes)) * row_scale * load(col_stats + n, lanes);
      if (bias) y += load(bias + n, lanes);
      if (extra) y += load(extra + i, lanes);
      store(place + n, y, lanes);
    });
  }

  // A part of the result, from products whose rows are `stride` apart, and those that were taken apart.
  template <class Apart>
  void finish(const int32_t* C, int64_t stride, Rectangle part, const Apart& apart) const {
    float products[kInt8BlockRows * Apart::kStride];
    if (!apart.empty()) apart.multiply(part, products);
    for (int64_t r = 0; r < part.rows; r++) {
      const float* const extra = apart.empty() ? nullptr : products + r * Apart::kStride;
      finish_row(C + r * stride, extra, part.row + r, part.column, part.columns);
    }
  }
};

void int8_mm_dequant(const int32_t* C, const float* row_stats, const float* col_stats, const void* bias,
                     const Matrix& out, Stream) {
  const int64_t N = out.columns;
  with_type(out, [&](auto* y) {
    const Int8Result<Pointee<decltype(y)>> result{row_stats, col_stats, same_type(bias, y), y, N};
    parallel_for(out.rows, grain(N), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) result.finish_row(C + r * N, nullptr, r, 0, N);
    });
  });
}

// Calls f(result, X) with elements of out's type.
template <class F>
void with_int8_result(const Int8Product& product, const Int8Outliers& outliers, const void* bias,
                      const Matrix& out, const F& f) {
  with_type(out, [&](auto* y) {
    const Int8Result<Pointee<decltype(y)>> result{product.row_stats, product.col_stats, same_type(bias, y), y,
                                                  product.B.rows};
    f(result, same_type(outliers.unquantized, y));
  });
}

// Parts of A @ B^T by dot products.
template <class Dot>
struct DotBlock {
  const Rows<int8_t>&A, &B;
  void operator()(Rectangle part, int32_t* C, int64_t stride) const {
    int8_block<Dot>(A, B, part, C, stride);
  }
};

// `block` multiplies a part of A @ B^T, into a C whose rows are a stride apart.
template <class Block>
void int8_multiply(const Block& block, const Rows<int8_t>& A, const Rows<int8_t>& B, int32_t* C) {
  for_each_int8_block(A, B,
                      [&](Rectangle part) { block(part, C + part.row * B.rows + part.column, B.rows); });
}

template <class Block>
void int8_multiply_mixed(const Block& block, const Int8Product& product, const Int8Outliers& outliers,
                         const void* bias, const Matrix& out) {
  const ColumnList list(outliers.columns, product.A.columns);
  with_int8_result(product, outliers, bias, out, [&](const auto& result, const auto* X) {
    const auto multiply = [&](const auto& apart) {
      for_each_int8_block(product.A, product.B, [&](Rectangle part) {
        int32_t C[kInt8BlockRows * kInt8BlockColumns];
        block(part, C, kInt8BlockColumns);
        result.finish(C, kInt8BlockColumns, part, apart);
      });
    };
    if (product.A.rows <= kFewRows && product.A.columns >= kGatheredBytes) {
      multiply(OutliersOfFewRows(X, product, list));
    } else {
      multiply(Outliers(X, product, list));
    }
  });
}

}  // namespace
}  // namespace bnb::BNB_TARGET
