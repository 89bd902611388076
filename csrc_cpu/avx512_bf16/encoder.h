// Encodes with a 256-entry codebook, 64 values at a time, without a gather.
//
// A cell is the values that agree in the upper 13 bits of an f16: seven of its mantissa, and its subnormal
// numbers give even steps to small values. Where no cell holds two thresholds, the number of those below a
// cell says which single one a value must be compared with; permutations look up both.
#pragma once

#include "../generic/optimizer.h"

namespace bnb::BNB_TARGET {
namespace {

// How many thresholds lie below each cell, by segments of 16 cells: an eighth of a power of two.
class CellRanks {
 public:
  // For `count` ascending positive thresholds. False if there are no such ranks.
  bool fill(const float* thresholds, int count) {
    int below = 0;
    for (int segment = 0; segment < kSegments; segment++) {
      below_[segment] = static_cast<uint16_t>(below);
      cells_[segment] = 0;
      for (; below < count && segment_of(thresholds[below]) <= segment; below++) {
        const int bit = 1 << cell_of(thresholds[below]) % kCells;
        if (cells_[segment] & bit) return false;
        cells_[segment] = static_cast<uint16_t>(cells_[segment] | bit);
      }
    }
    return below == count;
  }

  // Whether they hold for the magnitudes of `count` negative thresholds as well, which end at `last`.
  bool hold_for(const float* last, int count) const {
    for (int k = 0; k < count; k++) {
      const int segment = segment_of(-last[-k]), bit = 1 << cell_of(-last[-k]) % kCells;
      if (below_[segment] + __builtin_popcount(cells_[segment] & (bit - 1)) != k) return false;
    }
    return true;
  }

  void add(int count) {
    for (uint16_t& below : below_) below = static_cast<uint16_t>(below + count);
  }

  // Of 32 magnitudes in f16.
  BNB_INLINE __m512i operator()(__m512i magnitude) const {
    const __m512i cell = _mm512_srli_epi16(magnitude, kDroppedBits);
    const __m512i segment = _mm512_srli_epi16(magnitude, kDroppedBits + 4);
    const __mmask32 upper = _mm512_test_epi16_mask(segment, _mm512_set1_epi16(kSegments / 2));
    // The ones that a shift by the cell's place leaves.
    const __m512i others =
        _mm512_sllv_epi16(_mm512_set1_epi16(-1), _mm512_and_si512(cell, _mm512_set1_epi16(kCells - 1)));
    const __m512i before = _mm512_andnot_si512(others, look_up(cells_, segment, upper));
    return _mm512_add_epi16(look_up(below_, segment, upper), _mm512_popcnt_epi16(before));
  }

 private:
  static constexpr int kSegments = 128;
  static constexpr int kCells = 16;
  static constexpr int kDroppedBits = 3;

  static int cell_of(float magnitude) { return _cvtss_sh(magnitude, _MM_FROUND_TO_ZERO) >> kDroppedBits; }
  static int segment_of(float magnitude) { return cell_of(magnitude) / kCells; }

  static BNB_INLINE __m512i look_up(const uint16_t* table, __m512i i, __mmask32 upper) {
    const auto part = [=](int quarter) { return _mm512_load_si512(table + 32 * quarter); };
    return _mm512_mask_blend_epi16(upper, _mm512_permutex2var_epi16(part(0), i, part(1)),
                                   _mm512_permutex2var_epi16(part(2), i, part(3)));
  }

  alignas(64) uint16_t below_[kSegments], cells_[kSegments];
};

template <bool both_signs>
class RankEncoder {
 public:
  RankEncoder(const CellRanks& ranks, const BytePlanes& thresholds, int negatives, int zero)
      : zero(zero), ranks_(ranks), thresholds_(thresholds), last_negative_(2 * negatives - 1) {}

  // The codes of 64 scaled values.
  BNB_INLINE __m512i operator()(const F32 (&x)[4]) const {
    alignas(64) static constexpr auto kEvenBytes = even_bytes();
    const __m512i rank = _mm512_permutex2var_epi8(ranks_of(x[0], x[1]), _mm512_load_si512(kEvenBytes.values),
                                                  ranks_of(x[2], x[3]));
    F32 threshold[4];
    thresholds_.look_up(rank, threshold);
    const auto above = [&](int j) { return less(threshold[j], x[j]); };
    const __mmask64 more =
        _mm512_kunpackd(_mm512_kunpackw(above(3), above(2)), _mm512_kunpackw(above(1), above(0)));
    return _mm512_mask_sub_epi8(rank, more, rank, _mm512_set1_epi8(-1));
  }

  const int zero;

 private:
  struct Indices {
    uint8_t values[64];
  };
  static constexpr Indices even_bytes() {
    Indices indices{};
    for (int i = 0; i < 64; i++) indices.values[i] = static_cast<uint8_t>(2 * i);
    return indices;
  }

  // Of the thresholds below 32 values, as 16-bit numbers: those of a negative value count from the other end.
  BNB_INLINE __m512i ranks_of(F32 first, F32 second) const {
    const __m256i low = _mm512_cvtps_ph(first, _MM_FROUND_TO_ZERO),
                  high = _mm512_cvtps_ph(second, _MM_FROUND_TO_ZERO);
    const __m512i x = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    if constexpr (both_signs) {
      const __m512i rank = ranks_(_mm512_and_si512(x, _mm512_set1_epi16(0x7fff)));
      return _mm512_mask_subs_epu16(rank, _mm512_movepi16_mask(x), _mm512_set1_epi16(last_negative_), rank);
    } else {
      return ranks_(_mm512_max_epi16(x, _mm512_setzero_si512()));
    }
  }

  const CellRanks& ranks_;
  const BytePlanes& thresholds_;
  const int16_t last_negative_;
};

BNB_INLINE void store_codes(const Bytes& output, int64_t i, int64_t count, __m512i codes) {
  _mm512_mask_storeu_epi8(output.out + i, first_bytes(count), codes);
}
BNB_INLINE void store_codes(const RaisedBytes& output, int64_t i, int64_t count, __m512i codes) {
  __mmask64 raised = _mm512_mask_cmpeq_epi8_mask(first_bytes(count), codes,
                                                 _mm512_set1_epi8(static_cast<char>(output.zero)));
  if (raised) {
    __mmask64 positive = 0;
    for_each_of_bytes(count, [&](int j, auto) {
      positive |= static_cast<__mmask64>(less(F32{}, load(output.values + i + j * kLanes))) << (j * kLanes);
    });
    raised &= positive;
    codes = _mm512_mask_sub_epi8(codes, raised, codes, _mm512_set1_epi8(-1));
  }
  store_codes(output.bytes, i, count, codes);
}

template <class T, bool both_signs, class Output>
BNB_INLINE void encode_values(const T* a, int64_t n, F32 inverse, const RankEncoder<both_signs>& encode,
                              const Output& output) {
  for (int64_t i = 0; i < n; i += kBytes) {
    F32 x[4] = {};
    for_each_of_bytes(n - i, [&](int j, auto lanes) { x[j] = load(a + i + j * kLanes, lanes) * inverse; });
    store_codes(output, i, n - i, encode(x));
  }
}

// What encoding with a 256-entry codebook needs, found once for a tensor of n elements.
class RankEncoding {
 public:
  RankEncoding(const float* code, int64_t n)
      : usable_(n >= kLeastForRanks && find(code)),
        general_(code, usable_ ? 0 : n),
        table(general_.table),
        zero(general_.zero) {}

  RankEncoding(const RankEncoding&) = delete;
  RankEncoding& operator=(const RankEncoding&) = delete;

  template <class F>
  void with_encoder(const F& f) const {
    if (!usable_) return general_.with_encoder(f);
    if (negatives_ > 0) return f(RankEncoder<true>(ranks_, thresholds_, negatives_, zero));
    f(RankEncoder<false>(ranks_, thresholds_, negatives_, zero));
  }

 private:
  static constexpr int64_t kLeastForRanks = 1 << 12;
  static constexpr int kThresholds = 255;

  bool find(const float* code) {
    float thresholds[kThresholds + 1];
    for (int k = 0; k < kThresholds; k++) thresholds[k] = midpoint(code, k);
    thresholds[kThresholds] = __builtin_inff();
    thresholds_ = BytePlanes(thresholds);
    negatives_ = 0;
    while (negatives_ < kThresholds && thresholds[negatives_] < 0) negatives_++;
    if (!ranks_.fill(thresholds + negatives_, kThresholds - negatives_)) return false;
    if (negatives_ > 0 && !ranks_.hold_for(&thresholds[negatives_ - 1], negatives_)) return false;
    ranks_.add(negatives_);
    return true;
  }

  CellRanks ranks_;
  BytePlanes thresholds_;
  int negatives_;
  const bool usable_;
  const BlockwiseEncoding general_;

 public:
  const ByteTable& table;
  const int zero;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
