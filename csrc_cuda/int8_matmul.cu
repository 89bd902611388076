// LLM.int8(): products of int8 matrices, exact, and their scales (docs/SPEC.md section 4).
#include "device_limits.h"
#include "elements.h"
#include "mma_sums.h"
#include "operations.h"
#include "tiles.h"
#include "workspace.h"

namespace bnb {
namespace {

// What becomes of the exact products: they are kept, or scaled and rounded to a dtype.
struct Int8Result {
  int64_t M, N;
  int32_t* products;  // null where they are scaled
  const float* row_stats;
  const float* col_stats;
  const void* bias;
  void* out;
  DType dtype;
};

Int8Result scaled_result(const float* row_stats, const float* col_stats, const void* bias,
                         const Matrix& out) {
  return {out.rows, out.columns, nullptr, row_stats, col_stats, bias, out.data, out.dtype};
}

__device__ inline float scaled(const Int8Result& result, int64_t m, int64_t n, int32_t product) {
  return static_cast<float>(product) * (result.row_stats[m] / 16129.0f) * result.col_stats[n];
}

template <class T>
__device__ inline void store_scaled(const Int8Result& result, int64_t m, int64_t n, int32_t product,
                                    float addend = 0.0f) {
  float y = scaled(result, m, n, product);
  if (result.bias) y += to_float(static_cast<const T*>(result.bias)[n]);
  static_cast<T*>(result.out)[m * result.N + n] = from_float<T>(y + addend);
}

__device__ inline void store_result(const Int8Result& result, int64_t m, int64_t n, int32_t product) {
  if (result.products) {
    result.products[m * result.N + n] = product;
  } else if (result.dtype == DType::f32) {
    store_scaled<float>(result, m, n, product);
  } else if (result.dtype == DType::f16) {
    store_scaled<__half>(result, m, n, product);
  } else {
    store_scaled<__nv_bfloat16>(result, m, n, product);
  }
}

constexpr int kPiece = 16;             // bytes along K that a lane loads at once
constexpr int kSpan = kQuad * kPiece;  // what a warp takes of K at once
using Piece = Pack<uint32_t, kPiece / 4>;

// A piece of a row from p on, with zeros from `valid` on.
template <bool aligned>
__device__ inline Piece load_piece(const int8_t* p, int64_t valid) {
  Piece piece = {};
  if (aligned) {
    if (valid > 0) piece = *reinterpret_cast<const Piece*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < kPiece; i++)
      if (i < valid) piece[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(p[i])) << (i % 4 * 8);
  }
  return piece;
}

// C^T = B A^T: rows of B are the rows of the mma. A warp takes 32 of them and 8 * n_tiles rows of A; the
// warps of a block split either rows of B or K.
template <int n_tiles, bool aligned>
__global__ void __launch_bounds__(kMmaThreads, n_tiles == 8 ? 1 : 2)
    int8_matmul_kernel(Rows<int8_t> A, Rows<int8_t> B, Int8Result result, int row_warps) {
  using Sums = MmaSums<int32_t, n_tiles>;
  const int64_t K = A.columns;
  const int k_warps = kMmaWarps / row_warps, block_rows = row_warps * kWarpRows;
  const int row_warp = warp() % row_warps, k_warp = warp() / row_warps;
  const int row_blocks = static_cast<int>(ceil_div(result.N, block_rows)),
            block = static_cast<int>(blockIdx.x);
  const int64_t first_n = int64_t{block % row_blocks} * block_rows;
  const int64_t first_m = int64_t{block / row_blocks} * Sums::kColumns;
  const int g = lane() / kQuad, column = lane() % kQuad * kPiece;

  // Rows past the last are read from the last, and not stored.
  const int8_t *b[2 * kWarpTiles], *a[n_tiles];
  for (int r = 0; r < 2 * kWarpTiles; r++)
    b[r] = B.data + min(first_n + row_warp * kWarpRows + r * 8 + g, result.N - 1) * K + column;
  for (int r = 0; r < n_tiles; r++) a[r] = A.data + min(first_m + r * 8 + g, result.M - 1) * K + column;

  Sums sums = {};
  for (int64_t k = k_warp * kSpan; k < K; k += k_warps * kSpan) {
    const int64_t valid = K - k - column;
    Piece w[2 * kWarpTiles];
#pragma unroll
    for (int r = 0; r < 2 * kWarpTiles; r++) w[r] = load_piece<aligned>(b[r] + k, valid);
#pragma unroll
    for (int tile = 0; tile < n_tiles; tile++) {
      const Piece x = load_piece<aligned>(a[tile] + k, valid);
#pragma unroll
      for (int i = 0; i < kWarpTiles; i++) {
#pragma unroll
        for (int j = 0; j < kPiece / 4; j += 2) {
          const uint32_t rows[4] = {w[2 * i][j], w[2 * i + 1][j], w[2 * i][j + 1], w[2 * i + 1][j + 1]};
          const uint32_t columns[2] = {x[j], x[j + 1]};
          mma_16x8x32(sums.values[i][tile], rows, columns);
        }
      }
    }
  }

  int32_t* const shared = dynamic_shared<int32_t>();
  sums.store(shared, k_warp, row_warp, block_rows);
  __syncthreads();
  const int rows = static_cast<int>(min(result.M - first_m, static_cast<int64_t>(Sums::kColumns)));
  const int n = static_cast<int>(threadIdx.x) % block_rows;
  if (first_n + n >= result.N) return;
  for (int m = static_cast<int>(threadIdx.x) / block_rows; m < rows; m += kMmaThreads / block_rows)
    store_result(result, first_m + m, first_n + n, Sums::add(shared, k_warps, m, n, block_rows));
}

template <int n_tiles>
void launch_int8_matmul(const Rows<int8_t>& A, const Rows<int8_t>& B, const Int8Result& result,
                        Stream stream) {
  using Sums = MmaSums<int32_t, n_tiles>;
  const int64_t m_blocks = ceil_div(result.M, Sums::kColumns);
  const int64_t multiprocessors = device_limits().multiprocessors;
  // Warps of a block share rows as long as that leaves enough blocks to fill the chip.
  int row_warps = 1;
  while (row_warps < kMmaWarps &&
         ceil_div(result.N, 2 * row_warps * kWarpRows) * m_blocks >= 2 * multiprocessors)
    row_warps *= 2;
  const bool aligned = A.columns % kPiece == 0 && is_aligned(A.data, kPiece) && is_aligned(B.data, kPiece);
  const auto kernel = aligned ? int8_matmul_kernel<n_tiles, true> : int8_matmul_kernel<n_tiles, false>;
  launch("int8_matmul", kernel, ceil_div(result.N, row_warps * kWarpRows) * m_blocks, kMmaThreads, stream,
         Sums::kBytes, A, B, result, row_warps);
}

void multiply(const Rows<int8_t>& A, const Rows<int8_t>& B, const Int8Result& result, Stream stream) {
  if (result.M == 0 || result.N == 0) return;
  if (result.M <= 8) return launch_int8_matmul<1>(A, B, result, stream);
  if (result.M <= 16) return launch_int8_matmul<2>(A, B, result, stream);
  launch_int8_matmul<8>(A, B, result, stream);
}

constexpr int kItems = 8;  // neighbouring elements of a thread
constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) int8_mm_dequant_kernel(const int32_t* C, Int8Result result) {
  const int64_t N = result.N, row_chunks = ceil_div(N, kItems);
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  const T* const bias = static_cast<const T*>(result.bias);
  T* const out = static_cast<T*>(result.out);
  const bool whole =
      N % kItems == 0 && are_aligned<kItems>(C, result.col_stats) && are_aligned<kItems>(bias, out);
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < result.M * row_chunks; i += threads) {
    const int64_t m = i / row_chunks, n = i % row_chunks * kItems, valid = N - n;
    const float row_scale = result.row_stats[m] / 16129.0f;
    int32_t products[kItems];
    float columns[kItems], biases[kItems], y[kItems];
    load(C + m * N + n, whole, valid, products);
    load(result.col_stats + n, whole, valid, columns);
    if (bias) load_floats(bias + n, whole, valid, biases);
#pragma unroll
    for (int j = 0; j < kItems; j++) {
      y[j] = static_cast<float>(products[j]) * row_scale * columns[j];
      if (bias) y[j] += biases[j];
    }
    store_floats(out + m * N + n, whole, valid, y);
  }
}

void scale(const int32_t* C, const Int8Result& result, Stream stream) {
  const int64_t chunks = result.M * ceil_div(result.N, kItems);
  with_dtype(result.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch("int8_mm_dequant", int8_mm_dequant_kernel<T>, ceil_div(chunks, kThreads), kThreads, stream, 0, C,
           result);
  });
}

// The outlier columns of X [M, K] and of B [N, K], for products in full precision.
template <class T>
struct Outliers {
  const T* X;
  Rows<int8_t> B;
  const int64_t* columns;
  const int64_t* count;
};

// Lists the columns that are marked, ascending, and counts them; one block, each thread for neighbouring
// columns.
__global__ void __launch_bounds__(kThreads)
    list_columns_kernel(const uint8_t* marked, int64_t K, int64_t* columns, int64_t* count) {
  __shared__ int64_t first[kThreads + 1];
  const int64_t share = ceil_div(K, kThreads);
  const int64_t begin = min(K, threadIdx.x * share), end = min(K, begin + share);
  int64_t found = 0;
  for (int64_t k = begin; k < end; k++) found += marked[k] != 0;
  first[threadIdx.x + 1] = found;
  __syncthreads();
  if (threadIdx.x == 0) {
    first[0] = 0;
    for (int i = 0; i < kThreads; i++) first[i + 1] += first[i];
    *count = first[kThreads];
  }
  __syncthreads();
  int64_t at = first[threadIdx.x];
  for (int64_t k = begin; k < end; k++) {
    if (marked[k]) columns[at++] = k;
  }
}

template <class T>
__global__ void __launch_bounds__(kTileThreads)
    int8_mixed_dequant_kernel(const int32_t* C, Outliers<T> outliers, Int8Result result) {
  const int64_t count = *outliers.count;
  const auto fill = [&](int64_t m, int64_t n, int64_t at, float(&x)[kFilled], float(&w)[kFilled]) {
    const float scale = n < result.N ? result.col_stats[n] : 0.0f;
#pragma unroll
    for (int i = 0; i < kFilled; i++) {
      if (at + i >= count) continue;
      const int64_t k = outliers.columns[at + i];
      if (m < result.M) x[i] = to_float(outliers.X[m * outliers.B.columns + k]);
      if (n < result.N)
        w[i] = static_cast<float>(outliers.B.data[n * outliers.B.columns + k]) * scale / 127.0f;
    }
  };
  multiply_by_tiles(result.M, result.N, count, fill, [&](int64_t m, int64_t n, float sum) {
    store_scaled<T>(result, m, n, C[m * result.N + n], sum);
  });
}

}  // namespace

namespace gpu {

void int8_linear_matmul(const Rows<int8_t>& A, const Rows<int8_t>& B, int32_t* C, Stream stream) {
  Int8Result result = {};
  result.M = A.rows;
  result.N = B.rows;
  result.products = C;
  multiply(A, B, result, stream);
}

void int8_mm_dequant(const int32_t* C, const float* row_stats, const float* col_stats, const void* bias,
                     const Matrix& out, Stream stream) {
  scale(C, scaled_result(row_stats, col_stats, bias, out), stream);
}

void int8_mixed_scaled_mm(const Int8Product& product, const Int8Outliers& outliers, const void* bias,
                          const Matrix& out, Stream stream) {
  const Rows<int8_t>&A = product.A, &B = product.B;
  const int32_t* C = product.products;
  const Int8Result result = scaled_result(product.row_stats, product.col_stats, bias, out);
  if (!outliers.columns) return C ? scale(C, result, stream) : multiply(A, B, result, stream);
  const Workspace products(C ? 0 : out.count() * sizeof(int32_t), stream);
  if (!C) {
    C = products.as<int32_t>();
    int8_linear_matmul(A, B, products.as<int32_t>(), stream);
  }
  const Workspace columns((A.columns + 1) * sizeof(int64_t), stream);
  int64_t* const count = columns.as<int64_t>() + A.columns;
  launch("list_columns", list_columns_kernel, 1, kThreads, stream, 0, outliers.columns, A.columns,
         columns.as<int64_t>(), count);
  const int64_t tiles = ceil_div(out.columns, kTile) * ceil_div(out.rows, kTile);
  with_dtype(out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Outliers<T> apart = {static_cast<const T*>(outliers.unquantized), B, columns.as<int64_t>(), count};
    launch("int8_mixed_dequant", int8_mixed_dequant_kernel<T>, tiles, kTileThreads, stream, 0, C, apart,
           result);
  });
}

Dense int8_linear_backward(const Matrix& dY, const Int8Weight& weight, void*, Stream) {
  return dense_for(dY.dtype, weight.codes.rows);
}

}  // namespace gpu
}  // namespace bnb
