// Products of floating-point numbers, whose bits may differ from machine to machine: each is held to the
// bound of docs/SPEC.md section 3 against sums in f64.
#pragma once

#include <cmath>
#include <cstdio>

#include "inputs.h"

namespace {

inline double value_of(const Floats& floats, int64_t i) {
  const unsigned char* const p = &floats.bytes[i * size_of(floats.dtype)];
  if (floats.dtype == DType::f16) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const double sign = half >> 15 ? -1 : 1;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
  }
  uint32_t bits = 0;
  const size_t size = size_of(floats.dtype);
  std::memcpy(reinterpret_cast<unsigned char*>(&bits) + 4 - size, p, size);  // bf16: the upper half of an f32
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// What a sum of products, or a whole result, should be, and the sum of its terms' magnitudes.
struct Expected {
  double value = 0, terms = 0, inputs = 0;
  void add(double x, double w = 1) {
    value += x * w;
    terms += std::fabs(x * w);
    inputs += std::fabs(x);
  }
};

class Check {
 public:
  Check(const char* kernel, int d) : kernel_(kernel), d_(d) {}

  // Element i of a result, a sum of `count` terms.
  void element(const Floats& result, int64_t i, const Expected& expected, int64_t count) {
    const double sum = std::ldexp(std::sqrt(static_cast<double>(count)), -22);
    double bound = sum * expected.terms;
    if (result.dtype != DType::f32) {
      const double u = std::ldexp(1, result.dtype == DType::f16 ? -12 : -9);
      bound += u * (expected.terms + std::fabs(expected.value));
      if (result.dtype == DType::f16) bound += std::ldexp(expected.inputs, -25);
    }
    const double error = std::fabs(value_of(result, i) - expected.value);
    if (!(error <= bound)) beyond_++;
    elements_++;
  }
  ~Check() {
    std::printf("%s %s: %lld of %lld elements beyond the bound\n", kernel_, kDTypeNames[d_],
                static_cast<long long>(beyond_), static_cast<long long>(elements_));
  }

 private:
  const char* kernel_;
  int d_;
  int64_t beyond_ = 0, elements_ = 0;
};

// A 4-bit weight of random codes, with what it stands for.
struct RandomWeight {
  Vector<uint8_t> packed, codes;
  Vector<float> absmax, nested_absmax, nested_code = signed_code(), offset{2.0f};
  Weight4bit weight;
  std::vector<double> values;

  RandomWeight(int64_t N, int64_t K, int64_t blocksize, const Format4bit& format, bool nested)
      : packed(Random(5).integers<uint8_t>((N * K + 1) / 2)),
        weight{packed.data(), N, K, {}, blocksize, format.quant_type} {
    const int64_t blocks = weight.blocks();
    codes = Random(6).integers<uint8_t>(blocks);
    nested_absmax = Random(7).scales((blocks + 255) / 256);
    absmax = Random(8).scales(blocks);
    for (int64_t b = 0; nested && b < blocks; b++) {
      const float product = nested_code[codes[b]] * nested_absmax[b / 256];
      absmax[b] = product + offset[0];
    }
    weight.scales =
        nested
            ? BlockScales{nullptr, codes.data(), nested_absmax.data(), nested_code.data(), offset.data(), 256,
                          0}
            : f32_scales(absmax.data());
    for (int64_t i = 0; i < N * K; i++) {
      const int code = i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
      values.push_back(format.codebook[code] * absmax[i / blocksize]);
    }
  }
  RandomWeight(const RandomWeight&) = delete;
};

constexpr int64_t kWeightShapes[][2] = {{50, 512}, {9, 1000}, {7, 100},  {5, 37},
                                        {3, 1},    {1, 8},    {2, 4200}, {130, 24}};

inline void check_4bit(const Kernels& k, int d) {
  Check forward("gemm_4bit", d), backward("gemm_4bit_backward", d);
  for (const Format4bit& format : kFormats) {
    for (const auto& [N, K] : kWeightShapes) {
      for (const int64_t M : {1, 2, 3, 4, 5, 13}) {
        const bool nested = M % 2 == 1;
        const RandomWeight w(N, K, nested ? 64 : 32, format, nested);
        Floats A = random_floats(kDTypes[d], M, K), bias = random_floats(kDTypes[d], 1, N);
        Floats y(kDTypes[d], M, N), dA(kDTypes[d], M, K);
        k.gemm_4bit(A.matrix(), w.weight, nested ? bias.bytes.data() : nullptr, y.bytes.data(), nullptr);
        for (int64_t i = 0; i < M * N; i++) {
          Expected expected;
          for (int64_t j = 0; j < K; j++) expected.add(value_of(A, i / N * K + j), w.values[i % N * K + j]);
          if (nested) expected.add(value_of(bias, i % N));
          forward.element(y, i, expected, K);
        }
        Floats dY = random_floats(kDTypes[d], M, N);
        if (k.gemm_4bit_backward(dY.matrix(), w.weight, dA.bytes.data(), nullptr) != Dense::nothing) continue;
        for (int64_t i = 0; i < M * K; i++) {
          Expected expected;
          for (int64_t j = 0; j < N; j++) expected.add(value_of(dY, i / K * N + j), w.values[j * K + i % K]);
          backward.element(dA, i, expected, N);
        }
      }
    }
  }
}

inline void check_int8(const Kernels& k, int d) {
  Check forward("int8 products with outliers", d), backward("int8_linear_backward", d);
  for (const auto& shape : kWeightShapes) {
    const int64_t N = shape[0], K = shape[1];
    for (const int64_t M : {1, 2, 3, 4, 5, 13, 67}) {
      const auto a = Random(1).integers<int8_t>(M * K), b = Random(2).integers<int8_t>(N * K);
      const auto row_stats = Random(3).scales(M), col_stats = Random(4).scales(N);
      auto columns = Random(5).integers<uint8_t>(K);
      for (uint8_t& column : columns) column = column % 16 == 0;
      Floats X = random_floats(kDTypes[d], M, K), bias = random_floats(kDTypes[d], 1, N);
      Floats y(kDTypes[d], M, N), dY = random_floats(kDTypes[d], M, N), dA(kDTypes[d], M, K);
      const Rows<int8_t> A{a.data(), M, K}, B{b.data(), N, K};
      k.int8_mixed_scaled_mm({A, B, nullptr, row_stats.data(), col_stats.data()},
                             {X.bytes.data(), columns.data()}, bias.bytes.data(), y.matrix(), nullptr);
      const auto weight = [&](int64_t n, int64_t j) {
        return b[n * K + j] * static_cast<double>(col_stats[n]) / 127;
      };
      for (int64_t i = 0; i < M * N; i++) {
        const int64_t m = i / N, n = i % N;
        int64_t products = 0;
        Expected expected;
        for (int64_t j = 0; j < K; j++) {
          products += a[m * K + j] * b[n * K + j];
          if (columns[j]) expected.add(value_of(X, m * K + j), weight(n, j));
        }
        expected.add(products * (static_cast<double>(row_stats[m]) / 16129 * col_stats[n]));
        expected.add(value_of(bias, n));
        forward.element(y, i, expected, K + 4);
      }
      if (k.int8_linear_backward(dY.matrix(), {B, col_stats.data()}, dA.bytes.data(), nullptr) !=
          Dense::nothing)
        continue;
      for (int64_t i = 0; i < M * K; i++) {
        Expected expected;
        for (int64_t j = 0; j < N; j++) expected.add(value_of(dY, i / K * N + j), weight(j, i % K));
        backward.element(dA, i, expected, N + 4);
      }
    }
  }
}

inline void print_checks(const Kernels& k) {
  for (int d = 0; d < 3; d++) {
    check_4bit(k, d);
    check_int8(k, d);
  }
}

}  // namespace
