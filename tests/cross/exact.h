// Kernels whose bits are the same on every machine: each prints a hash of what it gives.
#pragma once

#include <cstdio>

#include "inputs.h"

namespace {

inline void print_hash(const char* kernel, int dtype, const Hash& hash) {
  std::printf("%s %s %016llx\n", kernel, kDTypeNames[dtype], static_cast<unsigned long long>(hash.state));
}

// Sizes around those of vectors, with whole and short last blocks; from 2^15 on a codebook is searched by
// another method.
constexpr int64_t kSizes[] = {1, 2, 3, 5, 8, 15, 17, 31, 33, 63, 64, 65, 129, 255, 4097, 70001};

inline void hash_blockwise(const Kernels& k, int d, bool any_bits) {
  Hash hash;
  for (const auto& code : {linear_code(), signed_code(), unsigned_code()}) {
    for (const int64_t n : kSizes) {
      for (const int64_t blocksize : {32, 256}) {
        Floats A = random_floats(kDTypes[d], 1, n, any_bits), values(kDTypes[d], 1, n);
        Vector<uint8_t> q(n);
        Vector<float> absmax((n + blocksize - 1) / blocksize);
        k.quantize_blockwise(A.matrix(), code.data(), blocksize, q.data(), absmax.data(), nullptr);
        k.dequantize_blockwise(q.data(), absmax.data(), code.data(), blocksize, values.matrix(), nullptr);
        hash.add(q);
        if (!any_bits) hash.add(absmax);
        if (!any_bits) hash.add(values.bytes);
      }
    }
  }
  print_hash(any_bits ? "blockwise, any bits" : "blockwise", d, hash);
}

inline void hash_4bit(const Kernels& k, int d, bool any_bits) {
  Hash hash;
  const auto nested_code = signed_code();
  const Vector<float> offset{0.25f};
  for (const Format4bit& format : kFormats) {
    for (const int64_t n : kSizes) {
      for (const int64_t blocksize : {32, 64, 4096}) {
        const int64_t blocks = (n + blocksize - 1) / blocksize;
        Floats A = random_floats(kDTypes[d], 1, n, any_bits), values(kDTypes[d], 1, n);
        Vector<uint8_t> packed((n + 1) / 2);
        Vector<float> absmax(blocks);
        k.quantize_4bit(A.matrix(), blocksize, format.quant_type, packed.data(), absmax.data(), nullptr);
        hash.add(packed);
        if (any_bits) continue;
        hash.add(absmax);
        Weight4bit weight{packed.data(), 1, n, f32_scales(absmax.data()), blocksize, format.quant_type};
        k.dequantize_4bit(weight, values.matrix(), nullptr);
        hash.add(values.bytes);
        const auto codes = Random(7).integers<uint8_t>(blocks);
        const auto nested_absmax = Random(8).scales(blocks / 256 + 1);
        weight.scales = {nullptr, codes.data(), nested_absmax.data(), nested_code.data(), offset.data(), 256,
                         0};
        k.dequantize_4bit(weight, values.matrix(), nullptr);
        hash.add(values.bytes);
      }
    }
  }
  print_hash(any_bits ? "4bit, any bits" : "4bit", d, hash);
}

inline void hash_int8_quantization(const Kernels& k, int d, bool any_bits) {
  Hash hash;
  for (const int64_t M : {1, 5, 37}) {
    for (const int64_t K : {1, 7, 64, 515}) {
      for (const float threshold : {0.0f, 12.0f}) {
        Floats A = random_floats(kDTypes[d], M, K, any_bits), values(kDTypes[d], M, K);
        Vector<int8_t> rowwise(M * K), columnwise(M * K);
        Vector<float> row_stats(M), col_stats(K);
        Vector<uint8_t> outliers(K);
        k.int8_vectorwise_quant(A.matrix(), threshold, rowwise.data(), row_stats.data(), outliers.data(),
                                nullptr);
        k.int8_columnwise_quant(A.matrix(), threshold, columnwise.data(), col_stats.data(), outliers.data(),
                                nullptr);
        hash.add(rowwise);
        hash.add(columnwise);
        hash.add(outliers);
        if (any_bits) continue;
        hash.add(row_stats);
        hash.add(col_stats);
        k.int8_vectorwise_dequant({{rowwise.data(), M, K}, row_stats.data()}, values.matrix(), nullptr);
        hash.add(values.bytes);
      }
    }
  }
  print_hash(any_bits ? "int8, any bits" : "int8", d, hash);
}

// Integer products of any bytes, -128 included, and what becomes of them without outliers.
inline void hash_int8_products(const Kernels& k, int d) {
  Hash hash;
  for (const int64_t M : {1, 2, 3, 4, 5, 8, 9, 15, 67}) {
    for (const int64_t N : {1, 2, 3, 5, 49}) {
      for (const int64_t K : {1, 7, 15, 16, 17, 64, 515}) {
        auto a = Random(1).integers<int8_t>(M * K), b = Random(2).integers<int8_t>(N * K);
        if (M == 8) a.assign(M * K, -128);
        if (M == 8) b.assign(N * K, -128);
        const Rows<int8_t> A{a.data(), M, K}, B{b.data(), N, K};
        Vector<int32_t> C(M * N);
        k.int8_linear_matmul(A, B, C.data(), nullptr);
        hash.add(C);
        const auto row_stats = Random(3).scales(M), col_stats = Random(4).scales(N);
        Floats bias = random_floats(kDTypes[d], 1, N), y(kDTypes[d], M, N);
        k.int8_mm_dequant(C.data(), row_stats.data(), col_stats.data(), bias.bytes.data(), y.matrix(),
                          nullptr);
        hash.add(y.bytes);
        const Int8Product product{A, B, nullptr, row_stats.data(), col_stats.data()};
        k.int8_mixed_scaled_mm(product, {nullptr, nullptr}, nullptr, y.matrix(), nullptr);
        hash.add(y.bytes);
      }
    }
  }
  print_hash("int8 products", d, hash);
}

inline void hash_optimizers(const Kernels& k, int d) {
  Hash bytes, floats;
  const auto code1 = signed_code(), code2 = unsigned_code();
  for (const int64_t n : {1, 3, 255, 5000, 40001}) {
    const int64_t blocks = (n + 255) / 256;
    const Floats g = random_floats(kDTypes[d], 1, n), start = random_floats(kDTypes[d], 1, n, false, 43);
    for (int name = 0; name <= static_cast<int>(OptimizerName::adagrad); name++) {
      const auto optimizer = static_cast<OptimizerName>(name);
      const bool bounded = optimizer == OptimizerName::lamb || optimizer == OptimizerName::lars;
      OptimizerStep step{optimizer,           1,         0.01, 0.9, 0.999, 0.9999, 5.0,    1e-8, 0.01, 0.5,
                         bounded ? 0.2 : 0.0, n == 5000, 0,    0,   0,     0,      nullptr};
      double norms[2];
      Floats p8 = start, p32 = start;
      Vector<uint8_t> codes1(2 * n, 127), codes2(n, 0);
      Vector<float> absmax1(2 * blocks), absmax2(blocks), state1(2 * n), state2(n);
      const Parameter8bit parameter8{g.bytes.data(), p8.bytes.data(), n, codes1.data(), codes2.data(),
                                     absmax1.data(), absmax2.data()};
      const Parameter32bit parameter32{g.bytes.data(), p32.bytes.data(), n, state1.data(), state2.data()};
      for (step.step = 1; step.step <= 3; step.step++) {
        k.optimizer_update_8bit_blockwise(step, {&parameter8, 1, kDTypes[d], nullptr},
                                          {code1.data(), code2.data()}, bounded ? norms : nullptr, nullptr);
        k.optimizer_update_32bit(step, {&parameter32, 1, kDTypes[d], nullptr}, bounded ? norms : nullptr,
                                 nullptr);
      }
      bytes.add(p8.bytes);
      for (const auto& codes : {codes1, codes2}) bytes.add(codes);
      for (const auto& absmax : {absmax1, absmax2}) bytes.add(absmax);
      floats.add(p32.bytes);
      for (const auto& state : {state1, state2}) floats.add(state);
    }
  }
  print_hash("optimizers, 8-bit state", d, bytes);
  print_hash("optimizers, 32-bit state", d, floats);
}

inline void print_hashes(const Kernels& k) {
  for (int d = 0; d < 3; d++) {
    for (const bool any_bits : {false, true}) {
      hash_blockwise(k, d, any_bits);
      hash_4bit(k, d, any_bits);
      hash_int8_quantization(k, d, any_bits);
    }
    hash_int8_products(k, d);
    hash_optimizers(k, d);
  }
}

}  // namespace
