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

void int8_vectorwise_quant(const void* A, DType dtype, int64_t M, int64_t K, float threshold, int8_t* q,
                           float* row_stats, uint8_t* outlier_columns, Stream) {
  const F32 limit = splat(threshold > 0 ? threshold : kNoThreshold);
  if (outlier_columns) __builtin_memset(outlier_columns, 0, K);
  with_type(dtype, A, [&](auto* a) {
    const auto measure = [&](int64_t begin, int64_t end) {
      const Buffer<uint8_t> found(K);
      __builtin_memset(found.data(), 0, K);
      for (int64_t r = begin; r < end; r++) {
        row_stats[r] = row_absmax(a + r * K, K, limit, outlier_columns ? found.data() : nullptr);
      }
      if (outlier_columns) merge_outlier_columns(found.data(), K, outlier_columns);
    };
    const auto quantize = [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const F32 absmax = splat(row_stats[r]);
        int8_quantize_row(a + r * K, K, int8_scale(absmax), outlier_columns, q + r * K);
        row_stats[r] = canonical_nan(int8_statistic(absmax))[0];
      }
    };
    // Every outlier column must be known before the first row is quantized.
    parallel_for(M, grain(K, kDecodedShare), measure);
    parallel_for(M, grain(K, kDecodedShare), quantize);
  });
}

// A strip of up to kStrip columns.
constexpr int64_t kStrip = 256;

template <class T>
void int8_quantize_columns(const T* a, int64_t M, int64_t K, int64_t first, int64_t columns, F32 threshold,
                           int8_t* q, float* col_stats, const uint8_t* outlier_columns) {
  I32 largest[kStrip / kLanes] = {};
  for (int64_t r = 0; r < M; r++) {
    for_each_vector(columns, [&](int64_t k, auto lanes) {
      I32& column = largest[k / kLanes];
      column = max(column, inlier_bits(load(a + r * K + first + k, lanes), threshold));
    });
  }
  F32 scales[kStrip / kLanes];
  for_each_vector(columns, [&](int64_t k, auto lanes) {
    const F32 absmax = from_bits(largest[k / kLanes]);
    F32 scale = int8_scale(absmax);
    if (outlier_columns) {
      scale = select(equal(load(outlier_columns + first + k, lanes), I32{}), scale, F32{});
    }
    scales[k / kLanes] = scale;
    store(col_stats + first + k, canonical_nan(int8_statistic(absmax)), lanes);
  });
  uint8_t* codes = reinterpret_cast<uint8_t*>(q);
  for (int64_t r = 0; r < M; r++) {
    for_each_vector(columns, [&](int64_t k, auto lanes) {
      const int64_t i = r * K + first + k;
      store(codes + i, int8_code(load(a + i, lanes), scales[k / kLanes]), lanes);
    });
  }
}

void int8_columnwise_quant(const void* A, DType dtype, int64_t M, int64_t K, float threshold, int8_t* q,
                           float* col_stats, const uint8_t* outlier_columns, Stream) {
  const F32 limit = splat(threshold > 0 ? threshold : kNoThreshold);
  with_type(dtype, A, [&](auto* a) {
    parallel_for(ceil_div(K, kStrip), grain(kStrip * M), [&](int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; strip++) {
        const int64_t first = strip * kStrip;
        int8_quantize_columns(a, M, K, first, min(kStrip, K - first), limit, q, col_stats, outlier_columns);
      }
    });
  });
}

void int8_vectorwise_dequant(const int8_t* q, const float* stats, int64_t M, int64_t K, float* out, Stream) {
  parallel_for(M, grain(K), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const F32 scale = splat(stats[r]);
      for_each_vector(K, [&](int64_t k, auto lanes) {
        const int64_t i = r * K + k;
        store(out + i, to_float(load(q + i, lanes)) * scale / splat(127.0f), lanes);
      });
    }
  });
}

constexpr int kInt8Rows = kRegisters == 32 ? 4 : 2;  // of a tile of accumulators in registers
constexpr int kInt8Columns = kRegisters == 32 ? 4 : 3;
constexpr int64_t kInt8PrefetchBytes = 2048;

// How a step of dot products is taken: 16-bit products of widened values. Another instruction may want its
// right operand raised by kOffset; the product of the offset and the left operand's sum is then taken off
// again.
struct PairsDot {
  typedef I16 Vector;
  static constexpr int kStep = kInt8Step;
  static constexpr int32_t kOffset = 0;
  static BNB_INLINE Vector left(const int8_t* p) { return load_int8(p); }
  static BNB_INLINE Vector right(const int8_t* p) { return load_int8(p); }
  static BNB_INLINE I32 add(I32 sums, Vector a, Vector b) { return sums + multiply_add_pairs(a, b); }
};

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
  for (int r = 0; r < rows; r++) {
    for (int c = 0; c < columns; c++) C[r * stride + c * apart] = reduce_add(sums[r][c]) - excess[r];
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

// C[rows, columns] of a block: register tiles, at the edges narrower ones.
template <class Dot>
void int8_block(const int8_t* A, const int8_t* B, int64_t rows, int64_t columns, int64_t K, int32_t* C,
                int64_t stride) {
  int32_t excess[kInt8BlockRows];
  for (int64_t r = 0; r < rows; r++) excess[r] = int8_excess<Dot>(A + r * K, K);
  const auto strip = [&](auto tile_rows, int64_t r) {
    constexpr int height = decltype(tile_rows)::value;
    const int8_t* a[height];
    for (int i = 0; i < height; i++) a[i] = A + (r + i) * K;
    // One row of A reads B once. Each column of a tile then has a part of B of its own from front to back:
    // few long streams are what memory delivers fastest.
    const int64_t tiles = columns / kInt8Columns;
    const int64_t apart = height == 1 ? tiles : 1;
    for (int64_t i = 0; i < tiles; i++) {
      const int64_t c = height == 1 ? i : i * kInt8Columns;
      int8_tile<Dot, height, kInt8Columns>(a, B + c * K, apart, K, excess + r, C + r * stride + c, stride);
    }
    for (int64_t c = tiles * kInt8Columns; c < columns; c++) {
      int8_tile<Dot, height, 1>(a, B + c * K, 1, K, excess + r, C + r * stride + c, stride);
    }
  };
  int64_t r = 0;
  for (; r + kInt8Rows <= rows; r += kInt8Rows) strip(Constant<kInt8Rows>{}, r);
  for (; r < rows; r++) strip(Constant<1>{}, r);
}

// Calls body(row, rows, column, columns) for every block of an M x N result.
template <class Body>
void for_each_int8_block(int64_t M, int64_t N, int64_t K, const Body& body) {
  const int64_t across = ceil_div(N, kInt8BlockColumns);
  const int64_t work = min(M, kInt8BlockRows) * kInt8BlockColumns * K;
  parallel_for(ceil_div(M, kInt8BlockRows) * across, grain(work / 8), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = i / across * kInt8BlockRows;
      const int64_t column = i % across * kInt8BlockColumns;
      body(row, min(kInt8BlockRows, M - row), column, min(kInt8BlockColumns, N - column));
    }
  });
}

template <class Dot>
void int8_linear_matmul(const int8_t* A, const int8_t* B, int64_t M, int64_t N, int64_t K, int32_t* C,
                        Stream) {
  for_each_int8_block(M, N, K, [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
    int8_block<Dot>(A + row * K, B + column * K, rows, columns, K, C + row * N + column, N);
  });
}

// One row of the result: C * (row_stat / 127^2) * col_stats + bias + extra, where bias and extra may be null.
template <class T>
void int8_finish_row(const int32_t* C, float row_stat, const float* col_stats, int64_t columns, const T* bias,
                     const float* extra, T* out) {
  const F32 row_scale = splat(row_stat / 16129.0f);
  for_each_vector(columns, [&](int64_t n, auto lanes) {
    F32 y = to_float(load(C + n, lanes)) * row_scale * load(col_stats + n, lanes);
    if (bias) y += load(bias + n, lanes);
    if (extra) y += load(extra + n, lanes);
    store(out + n, y, lanes);
  });
}

void int8_mm_dequant(const int32_t* C, const float* row_stats, const float* col_stats, int64_t M, int64_t N,
                     const void* bias, void* out, DType dtype, Stream) {
  with_type(dtype, out, [&](auto* y) {
    const auto* b = same_type(bias, y);
    parallel_for(M, grain(N), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        int8_finish_row(C + r * N, row_stats[r], col_stats, N, b, nullptr, y + r * N);
      }
    });
  });
}

// Rows of a block of the result, from products C whose rows are `stride` apart.
template <class Apart, class T>
void int8_finish_block(const int32_t* C, int64_t stride, int64_t row, int64_t rows, int64_t column,
                       int64_t width, const float* row_stats, const float* col_stats, const Apart& apart,
                       const T* bias, T* out, int64_t N) {
  float products[kInt8BlockRows * Apart::kStride];
  if (!apart.empty()) apart.multiply(row, rows, column, width, products);
  for (int64_t r = 0; r < rows; r++) {
    int8_finish_row(C + r * stride, row_stats[row + r], col_stats + column, width,
                    bias ? bias + column : nullptr, apart.empty() ? nullptr : products + r * Apart::kStride,
                    out + (row + r) * N + column);
  }
}

template <class Dot>
void int8_mixed_scaled_mm(const int8_t* A, const int8_t* B, int64_t M, int64_t N, int64_t K, const int32_t*,
                          const float* row_stats, const float* col_stats, const void* X,
                          const uint8_t* outlier_columns, const void* bias, void* out, DType dtype, Stream) {
  with_type(dtype, out, [&](auto* y) {
    const auto multiply = [&](const auto& apart) {
      for_each_int8_block(M, N, K, [&](int64_t row, int64_t rows, int64_t column, int64_t width) {
        int32_t C[kInt8BlockRows * kInt8BlockColumns];
        int8_block<Dot>(A + row * K, B + column * K, rows, width, K, C, kInt8BlockColumns);
        int8_finish_block(C, kInt8BlockColumns, row, rows, column, width, row_stats, col_stats, apart,
                          same_type(bias, y), y, N);
      });
    };
    const ColumnList list(outlier_columns, K);
    if (M <= kFewRows && K >= kGatheredBytes) {
      multiply(OutliersOfFewRows(same_type(X, y), M, B, K, col_stats, list));
    } else {
      multiply(Outliers<Pointee<decltype(y)>>(same_type(X, y), M, B, N, K, col_stats, list));
    }
  });
}

}  // namespace
}  // namespace bnb::BNB_TARGET
