// Neighbouring elements of an array between memory and a thread's registers.
#pragma once

#include <type_traits>

#include "device.h"

namespace bnb {

constexpr int kAccessBytes = 16;  // the most that a thread moves at once

// What one access moves of `count` elements.
template <class T, int count>
using Access =
    Pack<T, (count * sizeof(T) < kAccessBytes ? count : kAccessBytes / static_cast<int>(sizeof(T)))>;

inline bool is_aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Whether `count` elements at each of these addresses can be moved in whole accesses.
template <int count, class... T>
BNB_HOST_DEVICE inline bool are_aligned(const T*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % sizeof(Access<T, count>) == 0) && ...);
}

// Loads `count` elements: in whole accesses if `whole` says that the array is aligned and has so many,
// otherwise one by one, with zeros for those from `valid` on.
template <int count, class T>
__device__ inline void load(const T* p, bool whole, int64_t valid, T (&values)[count]) {
  using A = Access<T, count>;
  constexpr int width = sizeof(A) / sizeof(T);
  if (whole) {
#pragma unroll
    for (int i = 0; i < count; i += width) {
      const A access = *reinterpret_cast<const A*>(p + i);
#pragma unroll
      for (int j = 0; j < width; j++) values[i + j] = access[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; i++) values[i] = i < valid ? p[i] : T();
  }
}

// Stores those of the elements that come before `valid`, in whole accesses if `whole` is true.
template <int count, class T>
__device__ inline void store(T* p, bool whole, int64_t valid, const T (&values)[count]) {
  using A = Access<T, count>;
  constexpr int width = sizeof(A) / sizeof(T);
  if (whole) {
#pragma unroll
    for (int i = 0; i < count; i += width) {
      A access;
#pragma unroll
      for (int j = 0; j < width; j++) access[j] = values[i + j];
      *reinterpret_cast<A*>(p + i) = access;
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; i++) {
      if (i < valid) p[i] = values[i];
    }
  }
}

// Bytes between memory and words of four, the first in the lowest bits.
template <int count>
__device__ inline void load_bytes(const uint8_t* p, bool whole, int64_t valid, uint32_t (&words)[count]) {
  if (whole) {
    load(reinterpret_cast<const uint32_t*>(p), true, count, words);
  } else {
    uint8_t bytes[4 * count];
    load(p, false, valid, bytes);
    memcpy(words, bytes, sizeof words);
  }
}
template <int count>
__device__ inline void store_bytes(uint8_t* p, bool whole, int64_t valid, const uint32_t (&words)[count]) {
  if (whole) {
    store(reinterpret_cast<uint32_t*>(p), true, count, words);
  } else {
    uint8_t bytes[4 * count];
    memcpy(bytes, words, sizeof bytes);
    store(p, false, valid, bytes);
  }
}
__device__ inline uint32_t byte_of(uint32_t word, int i) { return __byte_perm(word, 0, 0x4440 + i); }

// Elements as floats; a register that holds two of bfloat16 becomes both in one instruction each.
template <class T, int count>
__device__ inline void to_floats(const T (&elements)[count], float (&values)[count]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && count % 2 == 0) {
#pragma unroll
    for (int i = 0; i < count; i += 2) {
      uint32_t pair;
      memcpy(&pair, elements + i, sizeof(pair));
      values[i] = __int_as_float(static_cast<int32_t>(pair << 16));
      values[i + 1] = __int_as_float(static_cast<int32_t>(pair & 0xffff0000u));
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; i++) values[i] = to_float(elements[i]);
  }
}

// The same for elements of any dtype as floats, rounded once when they are stored.
template <int count, class T>
__device__ inline void load_floats(const T* p, bool whole, int64_t valid, float (&values)[count]) {
  T elements[count];
  load(p, whole, valid, elements);
  to_floats(elements, values);
}
template <int count, class T>
__device__ inline void load_floats(const T* p, int64_t valid, float (&values)[count]) {
  load_floats(p, valid >= count && are_aligned<count>(p), valid, values);
}
template <int count, class T>
__device__ inline void store_floats(T* p, bool whole, int64_t valid, const float (&values)[count]) {
  T elements[count];
#pragma unroll
  for (int i = 0; i < count; i++) elements[i] = from_float<T>(values[i]);
  store(p, whole, valid, elements);
}

__device__ inline int32_t bits(float x) { return __float_as_int(x); }
__device__ inline float from_bits(int32_t x) { return __int_as_float(x); }

// |x| as its bits, which order like the magnitudes themselves and put NaN above infinity.
__device__ inline int32_t magnitude_bits(float x) { return bits(x) & 0x7fffffff; }

constexpr int32_t kSmallestNormal = 0x00800000;
constexpr int32_t kInfinity = 0x7f800000;
constexpr int32_t kNan = 0x7fc00000;

}  // namespace bnb
