// AdvSIMD of ARMv8.0-A, which every aarch64 machine has: 4 lanes.
#pragma once

#include <arm_neon.h>

#define BNB_VECTOR_BYTES 16
#include "vector_masks.h"

#include "scalar_lookups.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int kRegisters = 32;
constexpr int kTableRegisters = 1;  // in which one instruction looks up
constexpr bool kHasHalfTable = false;

BNB_INLINE F32 splat(float x) { return (F32)vdupq_n_f32(x); }
BNB_INLINE I32 splat(int32_t x) { return (I32)vdupq_n_s32(x); }

BNB_INLINE F32 fma(F32 a, F32 b, F32 c) {
  return (F32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
BNB_INLINE F32 sqrt(F32 x) { return (F32)vsqrtq_f32((float32x4_t)x); }
BNB_INLINE I32 max(I32 a, I32 b) { return (I32)vmaxq_s32((int32x4_t)a, (int32x4_t)b); }

BNB_INLINE float reduce_add(F32 x) { return vaddvq_f32((float32x4_t)x); }
BNB_INLINE int32_t reduce_add(I32 x) { return vaddvq_s32((int32x4_t)x); }
BNB_INLINE int32_t reduce_max(I32 x) { return vmaxvq_s32((int32x4_t)x); }
BNB_INLINE bool any(Mask m) { return vmaxvq_u32((uint32x4_t)m) != 0; }

BNB_INLINE F32 to_float(I32 x) { return (F32)vcvtq_f32_s32((int32x4_t)x); }
BNB_INLINE I32 round_to_int(F32 x) { return (I32)vcvtnq_s32_f32((float32x4_t)x); }

BNB_INLINE uint8x16_t load_bytes(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
BNB_INLINE uint8x8_t load_4_bytes(const void* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return vcreate_u8(word);
}
BNB_INLINE I32 load(const uint8_t* p) { return (I32)vmovl_u16(vget_low_u16(vmovl_u8(load_4_bytes(p)))); }
BNB_INLINE I32 load(const int8_t* p) {
  return (I32)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load_4_bytes(p)))));
}
BNB_INLINE void store(uint8_t* p, I32 x) {
  const uint16x4_t halves = vmovn_u32((uint32x4_t)x);
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(halves, halves));
  const uint32_t word = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
  __builtin_memcpy(p, &word, sizeof word);
}

// The upper half of each lane in memory, and zeros below.
BNB_INLINE I32 load_upper(const uint16_t* p) { return (I32)vshll_n_u16(vld1_u16(p), 16); }
BNB_INLINE void store_upper(uint16_t* p, I32 x) { vst1_u16(p, vshrn_n_u32((uint32x4_t)x, 16)); }

BNB_INLINE F32 load(const Half* p) { return (F32)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
BNB_INLINE void store(Half* p, F32 x) {
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
}

// kLanes nibbles in kLanes / 2 bytes, the high one first.
BNB_INLINE I32 load_nibbles(const uint8_t* p) {
  const I32 twice{p[0], p[0], p[1], p[1]};
  return (twice >> I32{4, 0, 4, 0}) & 15;
}
BNB_INLINE void store_nibbles(uint8_t* p, I32 x) {
  const uint64x2_t pair = (uint64x2_t)x;  // the even lane below the odd one
  const uint64x2_t packed = vorrq_u64(vshlq_n_u64(pair, 4), vshrq_n_u64(pair, 32));
  p[0] = static_cast<uint8_t>(vgetq_lane_u64(packed, 0));
  p[1] = static_cast<uint8_t>(vgetq_lane_u64(packed, 1));
}

// Where the bytes of lane i of a table of floats are, for an i below 64.
BNB_INLINE uint8x16_t bytes_of_lanes(I32 i) { return (uint8x16_t)(i * 0x04040404 + 0x03020100); }

BNB_INLINE F32 permute(F32 values, I32 i) { return (F32)vqtbl1q_u8((uint8x16_t)values, bytes_of_lanes(i)); }

}  // namespace
}  // namespace bnb::BNB_TARGET

#include "small_tables.h"

namespace bnb::BNB_TARGET {
namespace {

template <int size>
class Table<size, false> {
 public:
  explicit Table(const float* values) : values_(values) {}
  F32 operator[](I32 i) const { return look_up(values_, i); }

 private:
  const float* values_;
};

template <>
class Table<8, false> {
 public:
  explicit Table(const float* values) : values_{{load_bytes(values), load_bytes(values + 4)}} {}
  F32 operator[](I32 i) const { return (F32)vqtbl2q_u8(values_, bytes_of_lanes(i)); }

 private:
  uint8x16x2_t values_;
};
template <>
class Table<16, false> {
 public:
  explicit Table(const float* values)
      : values_{
            {load_bytes(values), load_bytes(values + 4), load_bytes(values + 8), load_bytes(values + 12)}} {}
  F32 operator[](I32 i) const { return (F32)vqtbl4q_u8(values_, bytes_of_lanes(i & 15)); }

 private:
  uint8x16x4_t values_;
};

// A vector of words, from memory or from different places.
struct GatheredWords {
  I32 words;
};
struct Words : GatheredWords {
  explicit Words(const uint8_t* p) : GatheredWords{load_words(p)} {}
};

// Rows of a weight that are decoded side by side. What one of them decodes at once takes 16 registers.
constexpr int kStreams = 2;

// What each of 16 codes stands for: one instruction looks up a byte of 16 values, so it takes four, and two
// steps in which these bytes come together.
class NibbleTable {
 public:
  explicit NibbleTable(const float* values) : table(values) {
    uint8_t bytes[sizeof planes_];
    for (int i = 0; i < 64; i++) bytes[i % 4 * 16 + i / 4] = reinterpret_cast<const uint8_t*>(values)[i];
    for (int i = 0; i < 4; i++) planes_[i] = load_bytes(bytes + 16 * i);
  }

  // Element i: what the i-th nibble of every word stands for, the lowest one first.
  class Values {
   public:
    Values(const NibbleTable& table, uint8x16_t bytes) {
      table.look_up(vandq_u8(bytes, vdupq_n_u8(15)), even_);
      table.look_up(vshrq_n_u8(bytes, 4), odd_);
    }
    BNB_INLINE F32 operator[](int i) const { return (i % 2 ? odd_ : even_)[i / 2]; }

   private:
    F32 even_[4], odd_[4];
  };
  BNB_INLINE Values operator()(GatheredWords words) const { return {*this, (uint8x16_t)words.words}; }

  // Consecutive elements, the first in the high nibble of a byte.
  struct Span {
    static constexpr int kVectors = 4;
    F32 values[kVectors];
  };
  BNB_INLINE Span span(const uint8_t* p) const {
    const uint8x8_t bytes = vld1_u8(p);
    const uint8x8_t high = vshr_n_u8(bytes, 4), low = vand_u8(bytes, vdup_n_u8(15));
    // Elements 0, 4, 8, 12, then 1, 5, 9, 13 and so on.
    const uint8x16_t order{0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};
    Span result;
    look_up(vqtbl1q_u8(vcombine_u8(high, low), order), result.values);
    return result;
  }

  const Table<16> table;

 private:
  // values[i]: what codes i, i + 4, i + 8 and i + 12 stand for.
  BNB_INLINE void look_up(uint8x16_t codes, F32 (&values)[4]) const {
    uint8x16_t byte[4];
    for (int i = 0; i < 4; i++) byte[i] = vqtbl1q_u8(planes_[i], codes);
    uint16x8_t half[2][2];  // for codes 0, 2, ... and for codes 1, 3, ...
    for (int i = 0; i < 2; i++) {
      half[0][i] = (uint16x8_t)vtrn1q_u8(byte[2 * i], byte[2 * i + 1]);
      half[1][i] = (uint16x8_t)vtrn2q_u8(byte[2 * i], byte[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
      values[i] = (F32)vtrn1q_u16(half[i][0], half[i][1]);
      values[2 + i] = (F32)vtrn2q_u16(half[i][0], half[i][1]);
    }
  }

  uint8x16_t planes_[4];
};

}  // namespace
}  // namespace bnb::BNB_TARGET

#include "vector_common.h"
