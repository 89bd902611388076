// LLM.int8(): quantization of rows and of columns by their absmax, and back (docs/SPEC.md section 4).
#include <cmath>

#include "elements.h"
#include "grid.h"
#include "operations.h"
#include "workspace.h"

namespace bnb {
namespace {

constexpr int kItems = 8;  // neighbouring elements of a thread
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Entries are multiplied by 127 / absmax, or by 0 where that or absmax is not finite.
__device__ inline float int8_scale(float absmax) {
  const float scale = 127.0f / absmax;
  return bits(scale) < kInfinity && bits(absmax) < kInfinity ? scale : 0.0f;
}

// The statistic to keep: 0 where 127 / absmax overflows.
__device__ inline float int8_statistic(float absmax) {
  if (absmax != absmax) return from_bits(kNan);
  return bits(127.0f / absmax) == kInfinity ? 0.0f : absmax;
}

// Where `scale` is 0 the code is 0, whatever x is. The sum's last bits are the nearest integer, ties to even.
__device__ inline int8_t int8_code(float x, float scale) {
  const float scaled = scale == 0 ? 0.0f : fminf(fmaxf(x * scale, -127.0f), 127.0f);
  return static_cast<int8_t>(bits(scaled + 12582912.0f));
}

// A row is held by a power of two of warps, each of which holds kHeld times kItems elements a thread; what is
// longer is read a second time.
constexpr int kHeld = 2;
constexpr int64_t kHeldByWarp = int64_t{kWarp} * kItems * kHeld;
constexpr int kMostThreads = 1024;
constexpr int kMostWarps = kMostThreads / kWarp;

// A [M, K], whose rows or columns are quantized by their absmax.
template <class T>
struct Int8Quantization {
  const T* a;
  int64_t M, K;
  float threshold;  // no comparison with it holds where there are no outliers
  int8_t* q;
  float* stats;  // of rows or of columns
};

template <class T>
Int8Quantization<T> quantization_of(const Matrix& A, float threshold, int8_t* q, float* stats) {
  return {A.as<const T>(), A.rows, A.columns, threshold > 0 ? threshold : NAN, q, stats};
}

template <class T>
class Row {
 public:
  __device__ Row(const T* a, int8_t* q, int64_t length, float threshold)
      : a_(a), q_(q), length_(length), threshold_(threshold), aligned_(are_aligned<kItems>(a, q)) {}

  __device__ void load(int64_t column, T (&values)[kItems]) const {
    bnb::load(a_ + column, is_whole(column), length_ - column, values);
  }

  // Raises `largest` to the largest inlier, and the flags of the columns of outliers.
  __device__ void measure(int64_t column, const T (&values)[kItems], int32_t& largest,
                          uint8_t* outliers) const {
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      if (is_outlier(values[i])) {
        store_relaxed(outliers + column + i, 1);
      } else {
        largest = max(largest, magnitude_bits(to_float(values[i])));
      }
    }
  }

  __device__ void quantize(int64_t column, const T (&values)[kItems], float scale) const {
    int8_t codes[kItems];
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      codes[i] = is_outlier(values[i]) ? int8_t{0} : int8_code(to_float(values[i]), scale);
    }
    store(q_ + column, is_whole(column), length_ - column, codes);
  }

 private:
  __device__ bool is_whole(int64_t column) const { return aligned_ && length_ - column >= kItems; }
  __device__ bool is_outlier(T value) const { return fabsf(to_float(value)) >= threshold_; }

  const T* a_;
  int8_t* q_;
  int64_t length_;
  float threshold_;
  bool aligned_;
};

// The largest value of `warps` neighbouring warps, a power of two; called by all threads of the block.
__device__ int32_t largest_of_warps(int32_t value, int warps, int32_t* shared) {
  value = warp_max(value);
  if (warps == 1) return value;
  __syncthreads();  // the last row's have been read
  if (lane() == 0) shared[warp()] = value;
  __syncthreads();
  const int first = warp() & ~(warps - 1);
  for (int i = 0; i < warps; i++) value = max(value, shared[first + i]);
  return value;
}

template <class T>
__global__ void __launch_bounds__(kMostThreads)
    quantize_rows_kernel(Int8Quantization<T> rows_of, int warps_per_row, uint8_t* outliers) {
  const auto [a, M, K, threshold, q, row_stats] = rows_of;
  __shared__ int32_t shared[kMostWarps];
  const int rows = static_cast<int>(blockDim.x) / kWarp / warps_per_row;
  const int threads = warps_per_row * kWarp;
  const int index = static_cast<int>(threadIdx.x) & (threads - 1);
  const int64_t step = int64_t{threads} * kItems;
  const int64_t begin = int64_t{index} * kItems;
  for (int64_t first = int64_t{blockIdx.x} * rows; first < M; first += int64_t{gridDim.x} * rows) {
    const int64_t r = first + warp() / warps_per_row;
    const int64_t length = r < M ? K : 0;
    const Row<T> row(a + r * K, q + r * K, length, threshold);
    T held[kHeld][kItems];
    int32_t largest = 0;
#pragma unroll
    for (int c = 0; c < kHeld; c++) row.load(begin + c * step, held[c]);
#pragma unroll
    for (int c = 0; c < kHeld; c++) row.measure(begin + c * step, held[c], largest, outliers);
    T other[kItems];
    for (int64_t column = begin + kHeld * step; column < length; column += step) {
      row.load(column, other);
      row.measure(column, other, largest, outliers);
    }
    const float absmax = from_bits(largest_of_warps(largest, warps_per_row, shared));
    const float scale = int8_scale(absmax);
#pragma unroll
    for (int c = 0; c < kHeld; c++) row.quantize(begin + c * step, held[c], scale);
    for (int64_t column = begin + kHeld * step; column < length; column += step) {
      row.load(column, other);
      row.quantize(column, other, scale);
    }
    if (index == 0 && r < M) row_stats[r] = int8_statistic(absmax);
  }
}

// Writes zeros to the columns that have an outlier in any row.
constexpr int64_t kClearedRows = 64;  // by one block of threads, which takes kThreads columns

__global__ void __launch_bounds__(kThreads)
    clear_columns_kernel(const uint8_t* outliers, int64_t M, int64_t K, int8_t* q) {
  const int64_t across = ceil_div(K, kThreads);
  const int64_t items = across * ceil_div(M, kClearedRows);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t column = item % across * kThreads + threadIdx.x;
    if (column >= K || !outliers[column]) continue;
    const int64_t first = item / across * kClearedRows;
    const int64_t end = first + kClearedRows < M ? first + kClearedRows : M;
    for (int64_t r = first; r < end; r++) q[r * K + column] = 0;
  }
}

// A block of threads takes a patch: each of its warps kItems columns a thread of every kWarps-th row.
constexpr int64_t kPatchColumns = int64_t{kWarp} * kItems;
constexpr int kRowsAtOnce = 4;
constexpr int64_t kPatchRows = int64_t{kWarps} * kRowsAtOnce * 4;

struct Patch {
  int64_t row, column;  // this thread's first
  int64_t end_row;
  int64_t columns;  // from its first on

  __device__ Patch(int64_t item, int64_t M, int64_t K) {
    const int64_t across = ceil_div(K, kPatchColumns);
    const int64_t first = item / across * kPatchRows;
    row = first + warp();
    column = item % across * kPatchColumns + lane() * kItems;
    end_row = first + kPatchRows < M ? first + kPatchRows : M;
    columns = K - column;
  }

  // Calls body(row, the values of this thread's columns), several rows loaded at once.
  template <class T, class Body>
  __device__ void for_each_row(const T* a, int64_t K, const Body& body) const {
    const bool whole = has_whole_rows(a, K);
    for (int64_t r = row; r < end_row; r += kRowsAtOnce * kWarps) {
      float x[kRowsAtOnce][kItems];
#pragma unroll
      for (int u = 0; u < kRowsAtOnce; u++) {
        const int64_t at = r + u * kWarps;
        const bool valid = at < end_row;
        load_floats(a + at * K + column, whole && valid, valid ? columns : 0, x[u]);
      }
#pragma unroll
      for (int u = 0; u < kRowsAtOnce; u++) {
        if (r + u * kWarps < end_row) body(r + u * kWarps, x[u]);
      }
    }
  }

  // Whether this thread's columns of every row can be moved in whole accesses.
  template <class T>
  __device__ bool has_whole_rows(const T* a, int64_t K) const {
    return columns >= kItems && are_aligned<kItems>(a) && K % kItems == 0;
  }
};

int64_t patches(int64_t M, int64_t K) {
  return ceil_div(K, kPatchColumns) * (M > kPatchRows ? ceil_div(M, kPatchRows) : 1);
}

// largest i32[K] starts as zeros and receives the bits of the absmax of each column's inliers.
template <class T>
__global__ void __launch_bounds__(kThreads)
    column_absmax_kernel(Int8Quantization<T> columns, int64_t items, int32_t* largest) {
  __shared__ int32_t of_warps[kWarps][kPatchColumns];
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Patch patch(item, columns.M, columns.K);
    int32_t mine[kItems] = {};
    patch.for_each_row(columns.a, columns.K, [&](int64_t, const float(&x)[kItems]) {
#pragma unroll
      for (int i = 0; i < kItems; i++) {
        if (!(fabsf(x[i]) >= columns.threshold)) mine[i] = max(mine[i], magnitude_bits(x[i]));
      }
    });
    __syncthreads();  // the last patch's have been read
#pragma unroll
    for (int i = 0; i < kItems; i++) of_warps[warp()][i * kWarp + lane()] = mine[i];
    __syncthreads();
    // Thread i * kWarp + j of kThreads = kPatchColumns has column i of lane j.
    const int64_t column = patch.column + warp();
    if (column < columns.K) {
      int32_t most = 0;
      for (int w = 0; w < kWarps; w++) most = max(most, of_warps[w][threadIdx.x]);
      atomicMax(largest + column, most);
    }
  }
}
static_assert(kPatchColumns == kThreads && kItems == kWarps, "a thread for each column of a patch");

template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_columns_kernel(Int8Quantization<T> columns, int64_t items, const int32_t* largest,
                            const uint8_t* outliers) {
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Patch patch(item, columns.M, columns.K);
    const bool whole = patch.has_whole_rows(columns.q, columns.K);
    float scales[kItems];
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      const int64_t column = patch.column + i;
      scales[i] = 0;
      if (i >= patch.columns) continue;
      const float absmax = from_bits(largest[column]);
      scales[i] = outliers && outliers[column] ? 0.0f : int8_scale(absmax);
      if (patch.row == 0) columns.stats[column] = int8_statistic(absmax);
    }
    patch.for_each_row(columns.a, columns.K, [&](int64_t row, const float(&x)[kItems]) {
      int8_t codes[kItems];
#pragma unroll
      for (int i = 0; i < kItems; i++) codes[i] = int8_code(x[i], scales[i]);
      store(columns.q + row * columns.K + patch.column, whole, patch.columns, codes);
    });
  }
}

constexpr int kOutputs = 4;
constexpr int kUnrolled = 4;
constexpr int kTile = kThreads * kOutputs * kUnrolled;

template <class T>
__global__ void __launch_bounds__(kThreads)
    dequantize_rows_kernel(const int8_t* q, const float* stats, int64_t n, int64_t K, T* out) {
  const bool aligned = are_aligned<kOutputs>(q) && are_aligned<kOutputs>(out);
  for (int64_t first = int64_t{blockIdx.x} * kTile; first < n; first += int64_t{gridDim.x} * kTile) {
    const int64_t first_row = first / K;
    const int64_t first_column = first - first_row * K;
    const bool whole = aligned && n - first >= kTile;
    int8_t codes[kUnrolled][kOutputs];
#pragma unroll
    for (int u = 0; u < kUnrolled; u++) {
      const int64_t begin = first + (u * kThreads + static_cast<int>(threadIdx.x)) * kOutputs;
      load(q + begin, whole, n - begin, codes[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; u++) {
      const int offset = (u * kThreads + static_cast<int>(threadIdx.x)) * kOutputs;
      const int64_t valid = n - first - offset;
      if (valid <= 0) continue;
      // Only small numbers are divided here.
      int64_t column = first_column + offset;
      const int64_t rows = K < kTile ? static_cast<int>(column) / static_cast<int>(K) : column >= K;
      int64_t row = first_row + rows;
      column -= rows * K;
      float y[kOutputs];
      float scale = stats[row];
      // Neighbours may lie in different rows.
#pragma unroll
      for (int i = 0; i < kOutputs; i++, column++) {
        if (column == K && i < valid) {
          column = 0;
          scale = stats[++row];
        }
        y[i] = static_cast<float>(codes[u][i]) * scale / 127.0f;
      }
      store_floats(out + first + offset, whole, valid, y);
    }
  }
}

}  // namespace

void gpu::int8_vectorwise_quant(const Matrix& A, float threshold, int8_t* q, float* row_stats,
                                uint8_t* outlier_columns, Stream stream) {
  const int64_t M = A.rows, K = A.columns;
  uint8_t* const outliers = threshold > 0 ? outlier_columns : nullptr;
  if (outliers && K > 0) {
    check(cudaMemsetAsync(outliers, 0, K, static_cast<cudaStream_t>(stream)), "int8_vectorwise_quant");
  }
  int warps_per_row = 1;
  while (warps_per_row < kMostWarps && warps_per_row * kHeldByWarp < K) warps_per_row *= 2;
  const int threads = std::max(kThreads, warps_per_row * kWarp);
  const int64_t rows = threads / kWarp / warps_per_row;
  with_dtype(A.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch("int8_vectorwise_quant", quantize_rows_kernel<T>, ceil_div(M, rows), threads, stream, 0,
           quantization_of<T>(A, threshold, q, row_stats), warps_per_row, outliers);
  });
  if (!outliers || M <= 1) return;  // a single row has left its outliers out itself
  launch("int8_vectorwise_quant: outlier columns", clear_columns_kernel,
         ceil_div(K, kThreads) * ceil_div(M, kClearedRows), kThreads, stream, 0, outliers, M, K, q);
}

void gpu::int8_columnwise_quant(const Matrix& A, float threshold, int8_t* q, float* col_stats,
                                const uint8_t* outlier_columns, Stream stream) {
  if (A.columns == 0) return;
  const size_t bytes = A.columns * sizeof(int32_t);
  const Workspace workspace(bytes, stream);
  int32_t* const largest = workspace.as<int32_t>();
  check(cudaMemsetAsync(largest, 0, bytes, static_cast<cudaStream_t>(stream)), "int8_columnwise_quant");
  const int64_t items = patches(A.rows, A.columns);
  with_dtype(A.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto columns = quantization_of<T>(A, threshold, q, col_stats);
    launch("int8_columnwise_quant: absmax", column_absmax_kernel<T>, items, kThreads, stream, 0, columns,
           items, largest);
    launch("int8_columnwise_quant", quantize_columns_kernel<T>, items, kThreads, stream, 0, columns, items,
           largest, threshold > 0 ? outlier_columns : nullptr);
  });
}

void gpu::int8_vectorwise_dequant(const Int8Weight& weight, const Matrix& out, Stream stream) {
  const int64_t n = out.count();
  with_dtype(out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch("int8_vectorwise_dequant", dequantize_rows_kernel<T>, resident_grid(ceil_div(n, kTile), kThreads),
           kThreads, stream, 0, weight.codes.data, weight.scales, n, weight.codes.columns, out.as<T>());
  });
}

}  // namespace bnb
