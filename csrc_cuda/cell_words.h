// Turns the states of optimizers into codes with one look-up each: what CellEncoder (encode.h) does, for maps
// that have at most one threshold in a cell.
//
// A word tells of a cell how many thresholds lie below it and where the one in it lies. Added to the value's
// last bits, it carries into the count if the value is above the threshold.
#pragma once

#include "encode.h"

namespace bnb {

// The values of a cell agree in sign, exponent and the first mantissa bits: six serve the signed dynamic map,
// seven the unsigned one. Codes of any other map are found by bisection.
template <bool is_signed>
class CellWords {
 public:
  static constexpr int kThreads = 256;

  struct Tables;

  // Called by all threads of a block; has a barrier inside, and needs one behind.
  static __device__ void prepare(Tables& tables, const float* code) {
    const int thread = static_cast<int>(threadIdx.x);
    const bool is_threshold = thread < kThresholds;
    const float threshold = is_threshold ? midpoint(code, thread) : from_bits(kInfinity);
    tables.thresholds()[thread] = threshold;
    tables.orders()[thread] = is_threshold ? static_cast<int16_t>(order_of(threshold)) : INT16_MAX;
    if (thread == 0) tables.misfits = 0;
    __syncthreads();
    if (is_threshold && !(fabsf(threshold) <= 1)) atomicMax(&tables.misfits, 1);
    if (threshold >= 0 && (thread == 0 || tables.thresholds()[thread - 1] < 0)) {
      tables.zero = thread;
      tables.least_positive = from_bits(bits(fabsf(threshold)) + 1);
    }
    fill(tables, thread * kRun, min((thread + 1) * kRun, kCells));
  }

  // For values of a block of this largest magnitude, four codes to a word: all that of 0.0 where it cannot be
  // scaled. With `raises`, a positive value takes the smallest positive code rather than that of 0.0.
  template <bool raises, int count>
  static __device__ void encode(const Tables& tables, int32_t largest, const float (&values)[count],
                                uint32_t (&words)[count / 4]) {
    if (__builtin_expect(tables.misfits || largest >= kEndOfQuickReciprocals, 0)) {
      return bisect<raises>(tables, largest, values, words);
    }
    const bool scalable = largest >= kSmallestNormal;
    const float inverse = scalable ? quick_reciprocal(from_bits(largest)) : 0.0f;
    float raised = kSmallest;  // of a block of zeros and subnormal values, none is
    if (raises && scalable) raised = fmaxf(tables.least_positive, kSmallest);
#pragma unroll
    for (int w = 0; w < count / 4; w++) {
      uint32_t sums[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float value = values[4 * w + i];
        sums[i] = sum_of(tables, value * inverse, raises && value > 0 ? raised : kSmallest);
      }
      words[w] =
          __byte_perm(__byte_perm(sums[0], sums[1], 0x0073), __byte_perm(sums[2], sums[3], 0x0073), 0x5410);
    }
  }

 private:
  static constexpr int kThresholds = 255;
  static constexpr int kMantissa = is_signed ? 6 : 7;
  static constexpr int kShift = 23 - kMantissa;           // to a cell from a value's bits
  static constexpr int kUp = 24 - kShift;                 // of the last bits, which end below the code
  static constexpr float kSmallest = 0x1p-24f;            // stands for all smaller magnitudes
  static constexpr int kFirst = (127 - 24) << kMantissa;  // its cell
  static constexpr int kLast = 127 << kMantissa;          // that of 1.0
  static constexpr int kCellsOfSign = kLast - kFirst + 1;
  static constexpr int kCells = is_signed ? 2 * kCellsOfSign : kCellsOfSign;
  static constexpr int kRun = (kCells + kThreads - 1) / kThreads;
  // A cell's word is found by the last bits of its number, which differ for cells of either sign.
  static constexpr int kCellMask = 0xfff;
  static constexpr int kOffset = is_signed ? ~kLast & kCellMask : kFirst & kCellMask;
  static constexpr int kWords = (kLast & kCellMask) + 1 - kOffset;
  // Words that no cell has: between those of both signs, or after all.
  static constexpr int kSpare = kCellsOfSign;
  static constexpr int kSpareWords = kThreads * 3 / 2;
  static constexpr int kAllWords = is_signed ? kWords : kWords + kSpareWords;
  static_assert(!is_signed || kCells + kSpareWords <= kWords, "thresholds and orders lie between the cells");

 public:
  struct Tables {
    uint32_t words[kAllWords];
    int misfits;           // whether codes are to be found by bisection
    int zero;              // the code of 0.0
    float least_positive;  // what it takes to get another code than that

    // f32[256], the last one above all values, and int16[256], the orders of their cells, ascending.
    __device__ float* thresholds() { return reinterpret_cast<float*>(words + kSpare); }
    __device__ const float* thresholds() const { return reinterpret_cast<const float*>(words + kSpare); }
    __device__ int16_t* orders() { return reinterpret_cast<int16_t*>(words + kSpare + kThreads); }
  };

 private:
  // Bits that order like the values.
  static __device__ int32_t ordered(float magnitude, float x) {
    return is_signed ? bits(magnitude) ^ bits(x) >> 31 : bits(magnitude);
  }
  static __device__ float magnitude_of(float x, float smallest) {
    return fmaxf(is_signed ? fabsf(x) : x, smallest);
  }

  // Its last byte is the code.
  static __device__ uint32_t sum_of(const Tables& tables, float x, float smallest) {
    const int32_t place = ordered(magnitude_of(x, smallest), x);
    const uint32_t offset = (static_cast<uint32_t>(place) & (kCellMask << kShift)) >> (kShift - 2);
    const char* words = reinterpret_cast<const char*>(tables.words) - kOffset * 4;
    return *reinterpret_cast<const uint32_t*>(words + offset) + (static_cast<uint32_t>(place) << kUp);
  }

  // Cells are counted by ascending values: `order` from 0 on, `cell` as the first bits of their values.
  static __device__ int cell_at(int order) {
    if (!is_signed) return order + kFirst;
    return order < kCellsOfSign ? order - kLast - 1 : order - kCellsOfSign + kFirst;
  }
  static __device__ int order_of(float threshold) {
    const int cell = place_of(threshold) >> kShift;
    if (!is_signed) return cell - kFirst;
    return cell < 0 ? cell + kLast + 1 : cell - kFirst + kCellsOfSign;
  }
  // No value is as far beyond 1 as the end of its cell.
  static __device__ int32_t place_of(float threshold) {
    constexpr int32_t end = ((kLast + 1) << kShift) - 1;
    const float magnitude = fminf(magnitude_of(threshold, kSmallest), from_bits(end));
    return ordered(magnitude, threshold);
  }

  static __device__ bool is_smallest(int order) {
    return is_signed ? order == kCellsOfSign || order == kCellsOfSign - 1 : order == 0;
  }

  static __device__ void fill(Tables& tables, int begin, int end) {
    int below = 0;
    for (int step = 128; step > 0; step /= 2) {
      if (tables.orders()[below + step - 1] < begin) below += step;
    }
    for (int order = begin; order < end; order++) {
      const int before = below, cell = cell_at(order);
      while (tables.orders()[below] <= order) below++;
      uint32_t word = (static_cast<uint32_t>(before) << 24) - (static_cast<uint32_t>(cell) << 24);
      if (below > before) {
        const uint32_t above = static_cast<uint32_t>(place_of(tables.thresholds()[before]) + 1) << kUp;
        word = (static_cast<uint32_t>(before + 1) << 24) - above;
      }
      tables.words[(cell & kCellMask) - kOffset] = word;
      if (below - before > (is_smallest(order) ? 0 : 1)) atomicMax(&tables.misfits, 1);
    }
  }

  template <bool raises, int count>
  static __device__ void bisect(const Tables& tables, int32_t largest, const float (&values)[count],
                                uint32_t (&words)[count / 4]) {
    const bool scalable = is_scalable(largest);
    const float inverse = scalable ? 1.0f / from_bits(largest) : 0.0f;
#pragma unroll
    for (int w = 0; w < count / 4; w++) {
      words[w] = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float value = values[4 * w + i];
        float x = value * inverse;
        if (raises && value > 0) x = fmaxf(x, tables.least_positive);
        int code = 0;
#pragma unroll 1
        for (int step = 128; step > 0; step /= 2) {
          if (tables.thresholds()[code + step - 1] < x) code += step;
        }
        words[w] |= static_cast<uint32_t>(scalable ? code : tables.zero) << 8 * i;
      }
    }
  }
};

}  // namespace bnb
