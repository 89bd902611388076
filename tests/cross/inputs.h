// Inputs that are the same on every machine, and hashes of what kernels make of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "../../csrc_shared/kernels.h"
#include "pages.h"

namespace {

using namespace bnb;

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};
constexpr const char* kDTypeNames[] = {"f32", "f16", "bf16"};

inline size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Memory that ends where a page begins that nobody may read: a kernel that reads or writes beyond it ends the
// program.
template <class T>
struct AtPageEnd {
  using value_type = T;
  AtPageEnd() = default;
  template <class Other>
  AtPageEnd(const AtPageEnd<Other>&) {}

  T* allocate(size_t n) {
    const size_t bytes = size_of_pages(n);
    return reinterpret_cast<T*>(static_cast<char*>(map_before_guard(bytes)) + bytes) - n;
  }
  void deallocate(T* p, size_t n) {
    const size_t bytes = size_of_pages(n);
    unmap(reinterpret_cast<char*>(p + n) - bytes, bytes);
  }
  bool operator==(const AtPageEnd&) const { return true; }
  bool operator!=(const AtPageEnd&) const { return false; }

 private:
  static size_t size_of_pages(size_t n) {
    return (n * sizeof(T) + page_size() - 1) / page_size() * page_size();
  }
};
template <class T>
using Vector = std::vector<T, AtPageEnd<T>>;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005 + 1442695040888963407;
    return static_cast<uint32_t>(state_ >> 32);
  }
  template <class Integer>
  Vector<Integer> integers(int64_t n) {
    Vector<Integer> values(n);
    for (Integer& value : values) value = static_cast<Integer>(bits() >> 8);
    return values;
  }
  // Between 0.5 and 2.
  Vector<float> scales(int64_t n) {
    Vector<float> values(n);
    for (float& value : values) value = 0.5f + 1.5f * static_cast<float>(bits() >> 8) / 0x1000000;
    return values;
  }

 private:
  uint64_t state_;
};

struct Floats {
  Vector<unsigned char> bytes;
  DType dtype;
  int64_t rows, columns;

  Floats(DType dtype, int64_t rows, int64_t columns)
      : bytes(rows * columns * size_of(dtype)), dtype(dtype), rows(rows), columns(columns) {}
  Matrix matrix() { return {bytes.data(), dtype, rows, columns}; }
};

// Bits of every kind: normal values of all sizes, subnormal ones, infinities and NaN now and then. Otherwise
// a sign and a magnitude between 2^-4 and 2^4.
inline Floats random_floats(DType dtype, int64_t rows, int64_t columns, bool any_bits = false,
                            uint64_t seed = 42) {
  Random random(seed);
  Floats result(dtype, rows, columns);
  for (int64_t i = 0; i < rows * columns; i++) {
    uint32_t bits = random.bits();
    if (!any_bits) bits = (bits & 0x807fffff) | ((123 + (bits >> 27) % 8) << 23);
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype == DType::f16 && !any_bits)
      half = static_cast<uint16_t>((half & 0x83ff) | ((11 + half % 8) << 10));
    if (dtype == DType::f32) std::memcpy(&result.bytes[4 * i], &bits, 4);
    if (dtype != DType::f32) std::memcpy(&result.bytes[2 * i], &half, 2);
  }
  return result;
}

// Ascending codebooks of 256 values: of equal steps, and of steps that grow with the value, as those of
// optimizers do.
inline Vector<float> linear_code() {
  Vector<float> code(256);
  for (int i = 0; i < 256; i++) code[i] = static_cast<float>(i - 127) / 128.0f;
  return code;
}
inline Vector<float> signed_code() {
  Vector<float> code = linear_code();
  for (float& value : code) value *= value < 0 ? -value : value;
  return code;
}
inline Vector<float> unsigned_code() {
  Vector<float> code(256);
  for (int i = 0; i < 256; i++) code[i] = static_cast<float>(i * i * i) / (255.0f * 255.0f * 255.0f);
  return code;
}

struct Hash {
  uint64_t state = 0xcbf29ce484222325;  // FNV-1a
  template <class T>
  void add(const Vector<T>& values) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); i++) state = (state ^ bytes[i]) * 0x100000001b3;
  }
};

}  // namespace
