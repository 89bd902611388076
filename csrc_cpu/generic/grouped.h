// Products with several 4-bit weights, each with rows of its own (docs/SPEC.md section 3): what each of them
// takes is left to the kernels of one weight.
#pragma once

#include "choice.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int64_t kUnitRows = 96;  // of a weight, at least: a multiple of what most kernels decode at a time
constexpr int64_t kDecodingRows = 8;  // whose products take about as long as decoding

bool are_offsets(const Groups& groups, int64_t rows) {
  bool ascending = groups.offsets[0] == 0 && groups.offsets[groups.count] == rows;
  for (int64_t e = 0; e < groups.count; e++) ascending &= groups.rows(e) >= 0;
  return ascending;
}

BNB_INLINE int64_t size_of(DType dtype) { return dtype == DType::f32 ? sizeof(float) : sizeof(Half); }

// `count` elements of a dtype further; null stays null.
inline void* advanced(const void* p, int64_t count, DType dtype) {
  return p ? const_cast<char*>(static_cast<const char*>(p)) + count * size_of(dtype) : nullptr;
}

// Weights of [N, K] cut into units of rows that begin with a block, for any number of threads. A unit counts
// for as many points as it takes time, by the rows that it is multiplied with.
class Units {
 public:
  Units(const Weight4bit& weights, const Groups& groups)
      : groups_(groups), N_(weights.N / groups.count), height_(height(weights)) {}

  int64_t points() const {
    int64_t sum = 0;
    for (int64_t e = 0; e < groups_.count; e++) sum += units() * points_of(e);
    return sum;
  }
  // Elements of a weight in a point.
  int64_t elements(int64_t K) const { return ceil_div(height_ * K, kDecodingRows); }

  // Calls body(e, first, count) for rows of weights, those of units whose first point is in [begin, end).
  template <class Body>
  void for_each(int64_t begin, int64_t end, const Body& body) const {
    int64_t start = 0;
    for (int64_t e = 0; e < groups_.count && start < end; e++) {
      const int64_t points = points_of(e);
      if (points == 0) continue;
      const auto row_from = [&](int64_t point) {
        const int64_t unit = point <= start ? 0 : ceil_div(point - start, points);
        return min(unit * height_, N_);
      };
      const int64_t first = row_from(begin), last = row_from(end);
      if (first < last) body(e, first, last - first);
      start += units() * points;
    }
  }

 private:
  static int64_t height(const Weight4bit& w) {
    int64_t rows = 1;
    while (rows * w.K % w.blocksize != 0) rows *= 2;
    return ceil_div(kUnitRows, rows) * rows;
  }
  int64_t units() const { return ceil_div(N_, height_); }
  int64_t points_of(int64_t e) const { return groups_.rows(e) == 0 ? 0 : kDecodingRows + groups_.rows(e); }

  const Groups& groups_;
  const int64_t N_, height_;
};

template <class Own>
bool grouped_gemm_4bit(const Matrix& A, const Weight4bit& weights, const Groups& groups, const void* bias,
                       void* out, Stream) {
  if (!are_offsets(groups, A.rows)) return false;
  if (A.rows == 0 || weights.N == 0) return true;
  const int64_t N = weights.N / groups.count, K = weights.K;
  const Units units(weights, groups);
  const int64_t least = grain(units.elements(K), kMultipliedShare);
  parallel_for(units.points(), least, [&](int64_t begin, int64_t end) {
    units.for_each(begin, end, [&](int64_t e, int64_t first, int64_t count) {
      const int64_t row = groups.begin(e);
      const Matrix rows{advanced(A.data, row * K, A.dtype), A.dtype, groups.rows(e), K};
      multiply_by_choice<Own>(
          rows, weights.rows(e * N + first, count),
          {advanced(bias, e * N + first, A.dtype), advanced(out, row * N + first, A.dtype), N});
    });
  });
  return true;
}

// Weights with few rows in one parallel region, each by one thread; those with many in turn, by all of them.
template <class Own>
bool grouped_gemm_4bit_backward(const Matrix& dY, const Weight4bit& weights, const Groups& groups, void* dA,
                                Stream) {
  if (!are_offsets(groups, dY.rows)) return false;
  if (dY.rows == 0) return true;
  constexpr int64_t kFewRows = 64;
  const int64_t N = weights.N / groups.count, K = weights.K;
  const auto differentiate = [&](int64_t e) {
    const int64_t row = groups.begin(e);
    const Matrix rows{advanced(dY.data, row * N, dY.dtype), dY.dtype, groups.rows(e), N};
    differentiate_by_choice<Own>(rows, weights.rows(e * N, N), advanced(dA, row * K, dY.dtype));
  };
  const Buffer<int64_t> few(groups.count);
  int64_t count = 0;
  for (int64_t e = 0; e < groups.count; e++) {
    if (groups.rows(e) == 0) continue;
    if (groups.rows(e) > kFewRows) {
      differentiate(e);
    } else {
      few.data()[count++] = e;
    }
  }
  parallel_for(count, grain(N * K, kMultipliedShare), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) differentiate(few.data()[i]);
  });
  return true;
}

}  // namespace
}  // namespace bnb::BNB_TARGET
