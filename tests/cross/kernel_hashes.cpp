// Runs the portable kernels on fixed inputs and prints a hash of the bits that each gives: two processors
// that print the same compute the same.

#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc_cpu/targets/targets.h"

namespace {

using namespace bnb;

constexpr int64_t kElements = 70001, kBlocksize = 64, kBlocks = (kElements + kBlocksize - 1) / kBlocksize;
constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};
constexpr const char* kDTypeNames[] = {"f32", "f16", "bf16"};

struct Hash {
  uint64_t state = 0xcbf29ce484222325;  // FNV-1a
  template <class T>
  void add(const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); i++) state = (state ^ bytes[i]) * 0x100000001b3;
  }
};

// Bits of every kind: normal values of all sizes, subnormal ones, infinities and NaN now and then.
uint32_t random_bits(uint64_t& seed) {
  seed = seed * 6364136223846793005 + 1442695040888963407;
  return static_cast<uint32_t>(seed >> 32);
}

size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

std::vector<unsigned char> random_floats(DType dtype, int64_t n, bool any_bits) {
  uint64_t seed = 42;
  std::vector<unsigned char> bytes(n * size_of(dtype));
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = random_bits(seed);
    // Otherwise a sign and a magnitude between 2^-4 and 2^4.
    if (!any_bits) bits = (bits & 0x807fffff) | ((123 + (bits >> 27) % 8) << 23);
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype == DType::f16 && !any_bits)
      half = static_cast<uint16_t>((half & 0x83ff) | ((11 + half % 8) << 10));
    if (dtype == DType::f32) std::memcpy(&bytes[4 * i], &bits, 4);
    if (dtype != DType::f32) std::memcpy(&bytes[2 * i], &half, 2);
  }
  return bytes;
}

std::vector<float> linear_code() {
  std::vector<float> code(256);
  for (int i = 0; i < 256; i++) code[i] = static_cast<float>(i - 127) / 128.0f;
  return code;
}

void print(const char* kernel, int dtype, const Hash& hash) {
  std::printf("%s %s %016llx\n", kernel, kDTypeNames[dtype], static_cast<unsigned long long>(hash.state));
}

Matrix matrix(std::vector<unsigned char>& values, int d, int64_t columns) {
  return {values.data(), kDTypes[d], static_cast<int64_t>(values.size() / size_of(kDTypes[d])) / columns,
          columns};
}

void hash_quantizers(const Kernels& k, int d, bool any_bits) {
  auto floats = random_floats(kDTypes[d], kElements, any_bits);
  const Matrix A = matrix(floats, d, kElements);
  const auto code = linear_code();
  std::vector<uint8_t> q(kElements), packed((kElements + 1) / 2);
  std::vector<float> absmax(kBlocks);
  std::vector<unsigned char> values(floats.size());
  const Matrix out = matrix(values, d, kElements);
  Hash blockwise, four_bit;
  k.quantize_blockwise(A, code.data(), kBlocksize, q.data(), absmax.data(), nullptr);
  blockwise.add(q);
  k.dequantize_blockwise(q.data(), absmax.data(), code.data(), kBlocksize, out, nullptr);
  if (!any_bits) blockwise.add(values);
  for (const Format4bit& format : kFormats) {
    k.quantize_4bit(A, kBlocksize, format.quant_type, packed.data(), absmax.data(), nullptr);
    four_bit.add(packed);
    k.dequantize_4bit({packed.data(), 1, kElements, f32_scales(absmax.data()), kBlocksize, format.quant_type},
                      out, nullptr);
    if (!any_bits) four_bit.add(values);
  }
  print(any_bits ? "blockwise, any bits" : "blockwise", d, blockwise);
  print(any_bits ? "4bit, any bits" : "4bit", d, four_bit);
}

void hash_int8(const Kernels& k, int d) {
  constexpr int64_t M = 37, K = 515;
  auto A = random_floats(kDTypes[d], M * K, false);
  std::vector<int8_t> q(M * K);
  std::vector<float> stats(M);
  std::vector<uint8_t> outliers(K);
  std::vector<int32_t> C(M * M);
  Hash hash;
  k.int8_vectorwise_quant(matrix(A, d, K), 12.0f, q.data(), stats.data(), outliers.data(), nullptr);
  const Rows<int8_t> rows{q.data(), M, K};
  k.int8_linear_matmul(rows, rows, C.data(), nullptr);
  hash.add(q);
  hash.add(stats);
  hash.add(outliers);
  hash.add(C);
  print("int8", d, hash);
}

void hash_optimizers(const Kernels& k, int d) {
  constexpr int64_t n = 5000, blocks = (n + 255) / 256;
  const auto g = random_floats(kDTypes[d], n, false), start = random_floats(kDTypes[d], n, false);
  const auto code = linear_code();
  Hash hash;
  for (int name = 0; name <= static_cast<int>(OptimizerName::adagrad); name++) {
    OptimizerStep step{
        static_cast<OptimizerName>(name), 1, 0.01, 0.9, 0.999, 0.9999, 5.0, 1e-8, 0.01, 1.0, 0.0, false};
    auto p = start;
    std::vector<uint8_t> state1(2 * n, 127), state2(n, 127);
    std::vector<float> absmax1(2 * blocks), absmax2(blocks);
    const Parameter8bit parameter{g.data(),       p.data(),      n, state1.data(), state2.data(),
                                  absmax1.data(), absmax2.data()};
    for (step.step = 1; step.step <= 3; step.step++)
      k.optimizer_update_8bit_blockwise(step, {&parameter, 1, kDTypes[d]}, {code.data(), code.data()},
                                        nullptr, nullptr);
    hash.add(p);
    hash.add(state1);
    hash.add(absmax1);
  }
  print("optimizers", d, hash);
}

}  // namespace

int main() {
  for (int d = 0; d < 3; d++) {
    hash_quantizers(bnb::portable_target.kernels, d, false);
    hash_quantizers(bnb::portable_target.kernels, d, true);
    hash_int8(bnb::portable_target.kernels, d);
    hash_optimizers(bnb::portable_target.kernels, d);
  }
}
