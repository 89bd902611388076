// int8 products on tiles: the weight's rows are used where they lie.
#pragma once

#include "../avx512_vnni/int8.h"
#include "tiles.h"

namespace bnb::BNB_TARGET {
namespace {

// Calls finish(row, rows, column, columns, sums) for blocks of A @ B^T; false where K is no whole number of
// steps.
template <class Finish>
bool multiply_int8_tiles(const int8_t* A, const int8_t* B, int64_t M, int64_t N, int64_t K,
                         const Finish& finish) {
  if (K % Int8Dot::kStep != 0 || M < kTileSide) return false;
  const RearrangedX x(A, M, K / 4);
  const auto rows_of_B = [&](int64_t n, int64_t count, uint8_t* buffer) -> const uint8_t* {
    const auto* rows = reinterpret_cast<const uint8_t*>(B + n * K);
    const int64_t padding = -count & (kPanelRows - 1);
    if (padding == 0) return rows;
    __builtin_memcpy(buffer, rows, count * K);
    __builtin_memset(buffer + count * K, 0, padding * K);
    return buffer;
  };
  multiply_tiles<Int8Dot>(x, M, N, K, rows_of_B, finish);
  return true;
}

void int8_linear_matmul_amx(const int8_t* A, const int8_t* B, int64_t M, int64_t N, int64_t K, int32_t* C,
                            Stream stream) {
  const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t width, const uint32_t* sums) {
    for (int64_t r = 0; r < rows; r++) {
      __builtin_memcpy(C + (row + r) * N + column, sums + r * kPanelRows, width * sizeof(int32_t));
    }
  };
  if (!multiply_int8_tiles(A, B, M, N, K, finish)) int8_linear_matmul<VnniDot>(A, B, M, N, K, C, stream);
}

void int8_mixed_scaled_mm_amx(const int8_t* A, const int8_t* B, int64_t M, int64_t N, int64_t K,
                              const float* row_stats, const float* col_stats, const void* X,
                              const int64_t* columns, int64_t outliers, const void* bias, void* out,
                              DType dtype, Stream stream) {
  bool done = false;
  with_type(dtype, out, [&](auto* y) {
    const Outliers<Pointee<decltype(y)>> apart(same_type(X, y), M, B, N, K, col_stats, columns, outliers);
    done = multiply_int8_tiles(
        A, B, M, N, K, [&](int64_t row, int64_t rows, int64_t column, int64_t width, const uint32_t* sums) {
          int8_finish_block(reinterpret_cast<const int32_t*>(sums), kPanelRows, row, rows, column, width,
                            row_stats, col_stats, apart, same_type(bias, y), y, N);
        });
  });
  if (!done) {
    int8_mixed_scaled_mm<VnniDot>(A, B, M, N, K, row_stats, col_stats, X, columns, outliers, bias, out, dtype,
                                  stream);
  }
}

}  // namespace
}  // namespace bnb::BNB_TARGET
