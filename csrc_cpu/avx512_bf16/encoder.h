// Encodes with a 256-entry codebook, 64 values at a time, without a gather.
//
// A cell is the magnitudes that agree in the upper 16 bits: eight of the exponent, seven of the mantissa.
// Where no cell holds two thresholds, the number of those below a cell says which single one a value must be
// compared with, and only if it is in the same cell: by the lower 16 bits. Permutations of bytes look up all
// of it.
#pragma once

#include "../generic/optimizer.h"

namespace bnb::BNB_TARGET {
namespace {

// Every second one of 64 bytes' worth of elements twice over, from the `first` on.
template <class T>
struct Indices {
  T values[64 / sizeof(T)];
};
template <class T>
constexpr Indices<T> every_second(int first) {
  Indices<T> indices{};
  for (int i = 0; i < static_cast<int>(64 / sizeof(T)); i++)
    indices.values[i] = static_cast<T>(2 * i + first);
  return indices;
}

// 128 bytes for every 128 of `size`, looked up by the lower seven bits of an index.
template <int size>
struct BytePermutation {
  alignas(64) uint8_t values[size];

  BNB_INLINE __m512i operator()(int part, __m512i i) const {
    const uint8_t* const first = values + 128 * part;
    return _mm512_permutex2var_epi8(_mm512_load_si512(first), i, _mm512_load_si512(first + 64));
  }
};

// Bytes of two vectors of 16-bit lanes: the lower one of each lane.
BNB_INLINE __m512i lower_bytes(const __m512i (&lanes)[2]) {
  alignas(64) static constexpr auto kIndices = every_second<uint8_t>(0);
  return _mm512_permutex2var_epi8(lanes[0], _mm512_load_si512(kIndices.values), lanes[1]);
}

BNB_INLINE __mmask64 join(__mmask32 low, __mmask32 high) { return _mm512_kunpackd(high, low); }

// The halves of 64 floats, as two vectors of 16-bit lanes each, and which of them are negative.
struct Halves {
  explicit BNB_INLINE Halves(const F32 (&x)[4]) {
    alignas(64) static constexpr auto kLower = every_second<uint16_t>(0), kUpper = every_second<uint16_t>(1);
    for (int i = 0; i < 2; i++) {
      const auto first = (__m512i)x[2 * i], second = (__m512i)x[2 * i + 1];
      lower[i] = _mm512_permutex2var_epi16(first, _mm512_load_si512(kLower.values), second);
      upper[i] = _mm512_permutex2var_epi16(first, _mm512_load_si512(kUpper.values), second);
      sign[i] = _mm512_movepi16_mask(upper[i]);
    }
  }
  __mmask64 negative() const { return join(sign[0], sign[1]); }

  __m512i lower[2], upper[2];
  __mmask32 sign[2];
};

// How many thresholds lie below each cell, by segments of eight cells: a sixteenth of a power of two.
class CellRanks {
 public:
  // For `count` ascending positive thresholds, where `before` others are less. False if there are no such
  // ranks.
  bool fill(const float* thresholds, int count, int before) {
    first_ = upper_half(thresholds[0]) - 1;  // it stands for all magnitudes that are smaller still
    if (first_ < 0 || cell_of(1.0f) >= kSegments * kCells) return false;
    int below = 0;
    for (int segment = 0; segment < kSegments; segment++) {
      below_.values[segment] = static_cast<uint8_t>(before + below);
      cells_.values[segment] = 0;
      for (; below < count && cell_of(thresholds[below]) / kCells <= segment; below++) {
        const int bit = 1 << cell_of(thresholds[below]) % kCells;
        if (cells_.values[segment] & bit) return false;
        cells_.values[segment] = static_cast<uint8_t>(cells_.values[segment] | bit);
      }
    }
    return below == count;
  }

  // Whether they hold for the magnitudes of `count` negative thresholds as well, which end at `last`.
  bool hold_for(const float* last, int count) const {
    for (int k = 0; k < count; k++) {
      const int cell = cell_of(-last[-k]);
      if (cell >= kSegments * kCells) return false;
      const int cells = cells_.values[cell / kCells], bit = 1 << cell % kCells;
      const int rank = below_.values[cell / kCells] + __builtin_popcount(cells & (bit - 1));
      if (!(cells & bit) || rank != count + k) return false;
    }
    return true;
  }

  struct Found {
    __m512i rank;        // thresholds below the value's cell
    __m512i cells, own;  // those of its segment that hold a threshold, and its own one: a bit each
  };
  // Of 64 magnitudes, given their upper halves.
  BNB_INLINE Found operator()(__m512i low, __m512i high) const {
    const __m512i first = _mm512_set1_epi16(static_cast<int16_t>(first_));
    const __m512i cell[2] = {_mm512_subs_epu16(low, first), _mm512_subs_epu16(high, first)};
    const __m512i segment[2] = {_mm512_srli_epi16(cell[0], 3), _mm512_srli_epi16(cell[1], 3)};
    const __m512i last_third = _mm512_set1_epi16(256 * kCells);
    const __mmask64 third =
        join(_mm512_test_epi16_mask(cell[0], last_third), _mm512_test_epi16_mask(cell[1], last_third));
    const __m512i i = lower_bytes(segment);
    const __mmask64 second = _mm512_movepi8_mask(i);
    const auto look_up = [&](const BytePermutation<kSegments>& table) {
      return _mm512_mask_blend_epi8(third, _mm512_mask_blend_epi8(second, table(0, i), table(1, i)),
                                    table(2, i));
    };
    const __m512i bits = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201));
    Found found;
    found.own = _mm512_permutexvar_epi8(lower_bytes(cell), bits);
    found.cells = look_up(cells_);
    const __m512i before = _mm512_and_si512(found.cells, _mm512_add_epi8(found.own, _mm512_set1_epi8(-1)));
    found.rank = _mm512_add_epi8(look_up(below_), _mm512_popcnt_epi8(before));
    return found;
  }

 private:
  static constexpr int kSegments = 384;
  static constexpr int kCells = 8;

  static int upper_half(float magnitude) {
    int32_t bits;
    __builtin_memcpy(&bits, &magnitude, sizeof bits);
    return bits >> 16;
  }
  int cell_of(float magnitude) const {
    const int cell = upper_half(magnitude) - first_;
    return cell < 0 ? 0 : cell;
  }

  int first_;
  BytePermutation<kSegments> below_, cells_;
};

// Bytes of two vectors in turn, 32 of each at a time.
struct Interleaved {
  uint8_t values[2][64];
};
constexpr Interleaved interleaved() {
  Interleaved indices{};
  for (int i = 0; i < 128; i++) indices.values[i / 64][i % 64] = static_cast<uint8_t>(i / 2 + i % 2 * 64);
  return indices;
}

// The lower halves of the thresholds, inverted where these are negative, so that both signs compare alike.
class LowerHalves {
 public:
  LowerHalves() = default;
  LowerHalves(const float* thresholds, int count) {
    for (int k = 0; k < count; k++) {
      int32_t bits;
      __builtin_memcpy(&bits, thresholds + k, sizeof bits);
      if (bits < 0) bits = ~bits;
      low_.values[k] = static_cast<uint8_t>(bits);
      high_.values[k] = static_cast<uint8_t>(bits >> 8);
    }
  }

  // Which of 64 values of given halves are greater than the threshold of that number, in whose cell they are.
  template <bool both_signs>
  BNB_INLINE __mmask64 less_than(const Halves& x, __m512i number) const {
    alignas(64) static constexpr auto kInterleaved = interleaved();
    const __mmask64 upper = _mm512_movepi8_mask(number);
    const auto look_up = [&](const BytePermutation<256>& table) {
      return _mm512_mask_blend_epi8(upper, table(0, number), table(1, number));
    };
    const __m512i low = look_up(low_), high = look_up(high_);
    __mmask32 less[2];
    for (int i = 0; i < 2; i++) {
      const __m512i indices = _mm512_load_si512(kInterleaved.values[i]);
      const __m512i threshold = _mm512_permutex2var_epi8(low, indices, high);
      const __m512i value =
          both_signs ? _mm512_mask_sub_epi16(x.lower[i], x.sign[i], _mm512_set1_epi16(-1), x.lower[i])
                     : x.lower[i];
      less[i] = _mm512_cmplt_epu16_mask(threshold, value);
    }
    return join(less[0], less[1]);
  }

 private:
  BytePermutation<256> low_{}, high_{};
};

template <bool both_signs>
class RankEncoder {
 public:
  RankEncoder(const CellRanks& ranks, const LowerHalves& thresholds, int negatives, int zero)
      : zero(zero), ranks_(ranks), thresholds_(thresholds), negatives_(negatives) {}

  // The codes of 64 scaled values.
  BNB_INLINE __m512i operator()(const F32 (&x)[4]) const {
    const __m512i one_less = _mm512_set1_epi8(-1);
    const Halves halves(x);
    if constexpr (!both_signs) {
      const __m512i none{};
      const auto found =
          ranks_(_mm512_max_epi16(halves.upper[0], none), _mm512_max_epi16(halves.upper[1], none));
      const __mmask64 shared = _mm512_test_epi8_mask(found.cells, found.own);
      const __mmask64 more = shared & thresholds_.less_than<false>(halves, found.rank);
      return _mm512_mask_sub_epi8(found.rank, more, found.rank, one_less);
    } else {
      const __m512i magnitude = _mm512_set1_epi16(0x7fff);
      const auto found =
          ranks_(_mm512_and_si512(halves.upper[0], magnitude), _mm512_and_si512(halves.upper[1], magnitude));
      // Those of a negative value count from the other end, and -1 stands before the first.
      const __mmask64 negative = halves.negative();
      const __m512i count = _mm512_set1_epi8(static_cast<char>(2 * negatives_));
      __m512i rank = _mm512_mask_subs_epu8(found.rank, negative, count, found.rank);
      rank = _mm512_mask_add_epi8(rank, negative, rank, one_less);
      const __mmask64 shared =
          _mm512_mask_test_epi8_mask(_mm512_cmpneq_epi8_mask(rank, one_less), found.cells, found.own);
      const __mmask64 more = (shared & thresholds_.less_than<true>(halves, rank)) | (negative & ~shared);
      return _mm512_mask_sub_epi8(rank, more, rank, one_less);
    }
  }

  const int zero;

 private:
  const CellRanks& ranks_;
  const LowerHalves& thresholds_;
  const int negatives_;
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
    float thresholds[kThresholds];
    for (int k = 0; k < kThresholds; k++) thresholds[k] = midpoint(code, k);
    thresholds_ = LowerHalves(thresholds, kThresholds);
    negatives_ = 0;
    while (negatives_ < kThresholds && thresholds[negatives_] < 0) negatives_++;
    const int positives = kThresholds - negatives_;
    if (positives == 0 || !ranks_.fill(thresholds + negatives_, positives, negatives_)) return false;
    return negatives_ == 0 || ranks_.hold_for(&thresholds[negatives_ - 1], negatives_);
  }

  CellRanks ranks_;
  LowerHalves thresholds_;
  int negatives_;
  const bool usable_;
  const BlockwiseEncoding general_;

 public:
  const ByteTable& table;
  const int zero;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
