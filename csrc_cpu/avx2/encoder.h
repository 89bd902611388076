// 4-bit codes of 32 values at a time, for codebooks in ascending order. A value becomes a key of 16 bits,
// which order as values do. The upper bits of a key name a cell that holds one threshold at most, whose key
// decides. Where the two keys are the same, the values themselves are compared.
#pragma once

#include "../generic/quantize.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int64_t kKeys = 32;  // at a time

// A byte for each of 32 cells.
class CellBytes {
 public:
  explicit CellBytes(const uint8_t (&bytes)[32]) {
    for (int i = 0; i < 2; i++) halves_[i] = _mm256_broadcastsi128_si256(load_128(bytes + 16 * i));
  }
  BNB_INLINE __m256i operator[](__m256i cells) const {
    const __m256i in_second = _mm256_slli_epi16(cells, 3);  // as the sign of a byte
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(halves_[0], cells), _mm256_shuffle_epi8(halves_[1], cells),
                              in_second);
  }

 private:
  __m256i halves_[2];
};

class KeyEncoder {
 public:
  explicit KeyEncoder(const Format4bit& format) : KeyEncoder(format, cells(format.codebook)) {}

  BNB_INLINE I32 operator()(F32 x) const { return nearest_(x); }

  // The codes of 32 values as 16 bytes, unless some are too near to a threshold to tell by keys.
  BNB_INLINE bool store_nibbles(uint8_t* out, const F32 (&x)[4]) const {
    // Packing takes four lanes of each in turn, and unpacking undoes it.
    const __m256i first = _mm256_packs_epi32(key(x[0]), key(x[1])),
                  second = _mm256_packs_epi32(key(x[2]), key(x[3]));
    const __m256i cells = _mm256_packus_epi16(cell(first), cell(second));
    const __m256i low = low_[cells], high = high_[cells];
    const __m256i thresholds = _mm256_unpacklo_epi8(low, high), more = _mm256_unpackhi_epi8(low, high);
    const __m256i same =
        _mm256_or_si256(_mm256_cmpeq_epi16(first, thresholds), _mm256_cmpeq_epi16(second, more));
    if (!_mm256_testz_si256(same, same)) return false;
    const __m256i above =
        _mm256_packs_epi16(_mm256_cmpgt_epi16(first, thresholds), _mm256_cmpgt_epi16(second, more));
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i codes = _mm256_permutevar8x32_epi32(_mm256_sub_epi8(below_[cells], above), in_order);
    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));  // 16 * even + odd
    const __m128i packed =
        _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
    return true;
  }

  const int zero;

 private:
  // Keys of [-1, 1] are within 16 bits, and cells narrower than thresholds are apart.
  static constexpr float kKeyScale = 32000;
  static constexpr int kCellShift = 11, kSmallestKey = -32768, kNoThreshold = 32767;
  static_assert((1 << kCellShift) + 1 <= kKeyScale / kUniformScale, "a cell may hold two thresholds");

  // How many thresholds lie below each cell, and the key of the one in it.
  struct CellTable {
    uint8_t below[32], low[32], high[32];
  };

  KeyEncoder(const Format4bit& format, const CellTable& table)
      : zero(format.zero), nearest_(format), below_(table.below), low_(table.low), high_(table.high) {}

  static BNB_INLINE __m256i key(F32 x) { return (__m256i)round_to_int(x * splat(kKeyScale)); }
  static BNB_INLINE __m256i cell(__m256i keys) {
    return _mm256_srli_epi16(_mm256_sub_epi16(keys, _mm256_set1_epi16(kSmallestKey)), kCellShift);
  }

  static CellTable cells(const float* codebook) {
    constexpr int kThresholds = 15;
    CellTable table;
    int next = 0;
    const auto next_key = [&] { return ((I32)key(splat(midpoint(codebook, next))))[0]; };
    for (int i = 0; i < 32; i++) {
      table.below[i] = static_cast<uint8_t>(next);
      int threshold = kNoThreshold;
      if (next < kThresholds && (next_key() - kSmallestKey) >> kCellShift == i) {
        threshold = next_key();
        next++;
      }
      table.low[i] = static_cast<uint8_t>(threshold);
      table.high[i] = static_cast<uint8_t>(threshold >> 8);
    }
    return table;
  }

  NearestEncoder nearest_;
  CellBytes below_, low_, high_;
};

template <class T>
BNB_INLINE void encode_values(const T* a, int64_t n, F32 inverse, const KeyEncoder& encode,
                              const Nibbles& output) {
  int64_t i = 0;
  for (; i + kKeys <= n; i += kKeys) {
    F32 x[4];
    for (int v = 0; v < 4; v++) x[v] = load(a + i + v * kLanes) * inverse;
    if (encode.store_nibbles(output.out + i / 2, x)) continue;
    for (int v = 0; v < 4; v++) output.put(i + v * kLanes, encode(x[v]), AllLanes{});
  }
  for_each_vector(n - i, [&](int64_t j, auto lanes) {
    output.put(i + j, encode(load(a + i + j, lanes) * inverse), lanes);
  });
}

struct KeyEncoding {
  template <class F>
  static void with_encoder(const Format4bit& format, const F& f) {
    if (format.encoder == Encoder::nearest) return f(KeyEncoder(format));
    Encoding4bit::with_encoder(format, f);
  }
};

}  // namespace
}  // namespace bnb::BNB_TARGET
