// What follows from the operations that each instruction set defines.
#pragma once

namespace bnb::BNB_TARGET {
namespace {

BNB_INLINE F32 abs(F32 x) { return from_bits(bits(x) & 0x7fffffff); }

BNB_INLINE F32 load(const BFloat16* p) { return from_bits(load_upper(&p->bits)); }
// x rounded to bf16, nearest even, in the upper half of each lane; every NaN becomes the quiet one.
BNB_INLINE I32 round_to_bfloat16(F32 x) {
  const I32 number = select(equal(x, x), bits(x), splat(0x7fc00000));
  return number + ((number >> 16) & 1) + 0x7fff;
}
BNB_INLINE void store(BFloat16* p, F32 x) { store_upper(&p->bits, round_to_bfloat16(x)); }

// How many lanes take part: all of them, known when compiling, or the first few at the end of an array.
struct AllLanes {};

template <class T>
BNB_INLINE auto load(const T* p, AllLanes) {
  return load(p);
}
template <class T>
BNB_INLINE void store(T* p, decltype(load(static_cast<const T*>(nullptr))) x, AllLanes) {
  store(p, x);
}
template <class T>
BNB_INLINE auto load(const T* p, int lanes) {
  T padded[kLanes] = {};
  __builtin_memcpy(padded, p, lanes * sizeof(T));
  return load(padded);
}
template <class T>
BNB_INLINE void store(T* p, decltype(load(static_cast<const T*>(nullptr))) x, int lanes) {
  T padded[kLanes];
  store(padded, x);
  __builtin_memcpy(p, padded, lanes * sizeof(T));
}

// Calls body(i, lanes) for i = 0, kLanes, ... below n.
template <class Body>
BNB_INLINE void for_each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, AllLanes{});
  if (i < n) body(i, static_cast<int>(n - i));
}

#if BNB_VECTOR_BYTES < 64
// The sum of each of kLanes vectors.
BNB_INLINE I32 reduce_adds(const I32 (&x)[kLanes]) {
  I32 sums;
  for (int i = 0; i < kLanes; i++) sums[i] = reduce_add(x[i]);
  return sums;
}
#endif

#if !defined(BNB_OWN_BYTE_TABLE)
// Looks bytes up in 256 floats, which may be null if it is not used.
class ByteTable {
 public:
  explicit ByteTable(const float* values) : values_(values) {}
  // Calls body(i, lanes, values) for the vectors of n bytes.
  template <class Body>
  BNB_INLINE void for_each(const uint8_t* codes, int64_t n, const Body& body) const {
    const Table<256> table(values_);
    for_each_vector(n, [&](int64_t i, auto lanes) { body(i, lanes, table[load(codes + i, lanes)]); });
  }

 private:
  const float* values_;
};
#endif

}  // namespace
}  // namespace bnb::BNB_TARGET
