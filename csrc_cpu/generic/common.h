// What the algorithms share: element types, threads, scratch memory, and how a product's sums become its
// result.
#pragma once

#include "../../csrc_shared/kernels.h"
#include "../memory.h"
#include "../threads.h"

namespace bnb::BNB_TARGET {
namespace {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many elements take some 10 us, which a thread should have before a second one is worth waking (3 us,
// where it does not sleep): of a quantizer or an optimizer, of what only decodes, of a product's weight.
constexpr int64_t kShare = 1 << 14, kDecodedShare = 1 << 16, kMultipliedShare = 1 << 18;

// The same in rows or blocks of `length` elements.
inline int64_t grain(int64_t length, int64_t share = kShare) { return ceil_div(share, max(length, 1)); }

// Calls body(begin, end) on parts of [0, n), of `least` or more where that is possible.
template <class Body>
void parallel_for(int64_t n, int64_t least, const Body& body) {
  const auto run = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  parallel_range(n, least, run, const_cast<Body*>(&body));
}

// Scratch memory: a little of it lies in the object, on the stack, as allocating takes as long as a small
// matmul.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(size <= kSmall ? small_ : static_cast<T*>(allocate(size * sizeof(T)))) {}
  ~Buffer() {
    if (data_ != small_) deallocate(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  // A sanitizer sees what is written beyond an allocation, not beyond the used part of an array.
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kSmall = 0;
#else
  static constexpr int64_t kSmall = 2048 / sizeof(T);
#endif
  alignas(64) mutable T small_[kSmall + 1];
  T* const data_;
};

// p as a pointer to what `like` points to.
template <class T>
const T* same_type(const void* p, const T*) {
  return static_cast<const T*>(p);
}

template <class T>
struct PointeeOf;
template <class T>
struct PointeeOf<T*> {
  using type = T;
};
template <class Pointer>
using Pointee = typename PointeeOf<Pointer>::type;

// An integer known when compiling, as an argument.
template <int n>
struct Constant {
  static constexpr int value = n;
};

// Calls f with p as a pointer to elements of `dtype`.
template <class F>
void with_type(DType dtype, void* p, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(p));
    case DType::f16:
      return f(static_cast<Half*>(p));
    case DType::bf16:
      return f(static_cast<BFloat16*>(p));
  }
}
template <class F>
void with_type(const Matrix& m, const F& f) {
  with_type(m.dtype, m.data, f);
}

// A part of a matrix.
struct Rectangle {
  int64_t row, rows, column, columns;
};

// What a product's sums become: bias is added to each row of out [M, N], and the result rounded once.
template <class T>
struct Result {
  const T* bias;  // null: none
  T* out;
  int64_t stride;  // from row to row of out

  // From sums whose rows are `apart` apart.
  void finish(const float* sums, int64_t apart, Rectangle part) const {
    const T* const added = bias ? bias + part.column : nullptr;
    for (int64_t r = 0; r < part.rows; r++) {
      T* const row = out + (part.row + r) * stride + part.column;
      for_each_vector(part.columns, [&](int64_t n, auto lanes) {
        const F32 sum = load(sums + r * apart + n, lanes);
        store(row + n, added ? sum + load(added + n, lanes) : sum, lanes);
      });
    }
  }
};

// Where a product goes, and what is added to its rows: out [M, stride] and bias, which may be null, of one
// dtype.
struct Destination {
  const void* bias;
  void* out;
  int64_t stride;

  // From some row on.
  template <class T>
  Result<T> result(int64_t row) const {
    return {static_cast<const T*>(bias), static_cast<T*>(out) + row * stride, stride};
  }
};

// max |a_i| as its bits, which order like the values themselves and put NaN above infinity.
constexpr int32_t kSmallestNormal = 0x00800000;
constexpr int32_t kInfinity = 0x7f800000;
constexpr int32_t kNan = 0x7fc00000;

BNB_INLINE float float_from_bits(int32_t x) {
  float result;
  __builtin_memcpy(&result, &x, sizeof result);
  return result;
}

}  // namespace
}  // namespace bnb::BNB_TARGET
