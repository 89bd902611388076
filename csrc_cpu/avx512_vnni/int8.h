// int8 products with vpdpbusd, four at a time: dot products for a few rows, strips for many.
#pragma once

#include "../generic/int8.h"
#include "strips.h"

namespace bnb::BNB_TARGET {
namespace {

// vpdpbusd multiplies unsigned with signed bytes: flipping its top bit raises a signed byte by 128.
struct VnniDot {
  typedef __m512i Vector;
  static constexpr int kStep = 64;
  static constexpr int32_t kOffset = 128;
  static BNB_INLINE Vector left(const int8_t* p) { return _mm512_loadu_si512(p); }
  static BNB_INLINE Vector right(const int8_t* p) {
    return _mm512_xor_si512(left(p), _mm512_set1_epi8(-128));
  }
  static BNB_INLINE I32 add(I32 sums, Vector a, Vector b) {
    return (I32)_mm512_dpbusd_epi32((__m512i)sums, b, a);
  }
};

struct FoursOfBytes {
  typedef I32 Sums;
  static BNB_INLINE I32 add(I32 sums, __m512i word, __m512i x) {
    return (I32)_mm512_dpbusd_epi32((__m512i)sums, x, word);
  }
};

// Products of many rows. X's codes are raised by 128, and what that adds is taken off by row of B.
class StripInt8 {
 public:
  static bool serves(const Rows<int8_t>& A) { return A.columns % kBytesInVector == 0 && A.rows > kTileSide; }

  static void run(const Rows<int8_t>& A, const Rows<int8_t>& B, int32_t* C) {
    multiply(A, B, [&](Rectangle part, const int32_t* sums) {
      for (int64_t r = 0; r < part.rows; r++) {
        int32_t* const row = C + (part.row + r) * B.rows + part.column;
        __builtin_memcpy(row, sums + r * kStripRows, part.columns * sizeof(int32_t));
      }
    });
  }

  static void run(const Int8Product& product, const Int8Outliers& outliers, const void* bias,
                  const Matrix& out) {
    const ColumnList list(outliers.columns, product.A.columns);
    with_int8_result(product, outliers, bias, out, [&](const auto& result, const auto* X) {
      const Outliers apart(X, product, list);
      multiply(product.A, product.B,
               [&](Rectangle part, const int32_t* sums) { result.finish(sums, kStripRows, part, apart); });
    });
  }

 private:
  static constexpr int64_t kBytesInVector = 64;
  static constexpr int kRaise = 128;

  static RearrangedX raised(const int8_t* a, int64_t rows, int64_t K) {
    return RearrangedX(
        rows, K / 4, Constant<kTileSide>{}, [=](int64_t row, int count, int64_t word, uint32_t* out) {
          for (int r = 0; r < count; r++) {
            const __m512i codes = _mm512_loadu_si512(a + (row + r) * K + 4 * word);
            _mm512_store_si512(out + r * kTileSide, _mm512_xor_si512(codes, _mm512_set1_epi8(-kRaise)));
          }
          return RowWords{out, kTileSide};
        });
  }

  // Calls finish(part, sums[rows, kStripRows]) for blocks of A @ B^T.
  template <class Finish>
  static void multiply(const Rows<int8_t>& A, const Rows<int8_t>& B, const Finish& finish) {
    const int64_t K = A.columns, N = B.rows;
    for (int64_t row = 0; row < A.rows; row += kMostRearrangedRows) {
      const int64_t M = min(A.rows - row, kMostRearrangedRows);
      const RearrangedX x = raised(A.data + row * K, M, K);
      parallel_for(ceil_div(N, kStripRows), grain(kStripRows * M * K / 8), [&](int64_t begin, int64_t end) {
        const StripPanel<FoursOfBytes> panel(x, M);
        for (int64_t n = begin * kStripRows; n < min(end * kStripRows, N); n += kStripRows) {
          const int64_t count = min(N - n, kStripRows);
          I32 excess[kStripRows] = {};
          panel.multiply(count, [&](int64_t k, int64_t depth, uint32_t* words) {
            for (int64_t r = 0; r < count; r++) {
              copy(B.data + (n + r) * K + 4 * k, depth, words + r * kStripStride, excess[r]);
            }
          });
          take_off(panel, excess, [&](Rectangle part, const int32_t* sums) {
            finish({row + part.row, part.rows, n, count}, sums);
          });
        }
      });
    }
  }

  // Copies a part of a row of B, and adds its products with the raise.
  static void copy(const int8_t* from, int64_t words, uint32_t* to, I32& excess) {
    for (int64_t i = 0; i < words; i += kTileSide) {
      const __m512i codes = _mm512_loadu_si512(from + 4 * i);
      _mm512_store_si512(to + i, codes);
      excess = (I32)_mm512_dpbusd_epi32((__m512i)excess, _mm512_set1_epi8(-kRaise), codes);
    }
  }

  template <class Finish>
  static void take_off(const StripPanel<FoursOfBytes>& panel, const I32 (&excess)[kStripRows],
                       const Finish& finish) {
    alignas(64) int32_t taken[kStripRows];
    for (int64_t n = 0; n < kStripRows; n++) taken[n] = reduce_add(excess[n]);
    panel.finish([&](int64_t row, int64_t rows, uint32_t* words) {
      auto* const sums = reinterpret_cast<int32_t*>(words);
      for (int64_t r = 0; r < rows; r++) {
        for (int64_t n = 0; n < kStripRows; n += kLanes) {
          const I32 all = load(sums + r * kStripRows + n) - load(taken + n);
          __builtin_memcpy(sums + r * kStripRows + n, &all, sizeof all);
        }
      }
      finish(Rectangle{row, rows, 0, 0}, sums);
    });
  }
};

}  // namespace
}  // namespace bnb::BNB_TARGET
