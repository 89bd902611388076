// Turns values scaled to [-1, 1] into codes: the number of thresholds below them, where a threshold lies
// midway between neighbouring entries of the codebook (docs/SPEC.md section 2).
//
// A class of encoders has a Source, which the host gives, and Tables in shared memory, which the threads of a
// block make from it; `encode` wants them complete, and so comes after a barrier.
#pragma once

#include "../csrc_shared/uniform_cells.h"
#include "quotient.h"

namespace bnb {

// For 256 entries in any ascending order, in blocks of 256 threads. A table tells how many thresholds lie
// below the cell of a value: the values whose sign, exponent and first seven mantissa bits agree. Those in
// the cell are compared with; every map in use has one of them at most.
class CellEncoder {
 public:
  using Source = const float*;  // f32[256]
  static constexpr int kBits = 8;
  static constexpr bool kTakesNan = true;  // and gives it some code
  static constexpr int kThreads = 256;

 private:
  static constexpr int kThresholds = 255;
  static constexpr int kFirst = (127 - 24) << 7;  // the cell from 2^-24 on, in which are all smaller values
  static constexpr int kCells = (127 << 7) - kFirst + 1;  // of one sign: the last one begins with 1
  static constexpr int kRun = (2 * kCells + kThreads - 1) / kThreads;

 public:
  struct Tables {
    float thresholds[kThreads];  // the last one is above all values
    uint8_t below[2 * kCells];   // positive cells from the smallest magnitude on, then negative ones
    int16_t orders[kThreads];    // of the thresholds' cells
    int most_in_cell;
    int zero;  // the code of 0.0
  };

  // Called by all threads of a block; has a barrier inside, and needs one behind.
  static __device__ void prepare(Tables& tables, Source code) {
    const int thread = static_cast<int>(threadIdx.x);
    const bool is_threshold = thread < kThresholds;
    const float threshold = is_threshold ? midpoint(code, thread) : from_bits(kInfinity);
    tables.thresholds[thread] = threshold;
    tables.orders[thread] =
        is_threshold ? order_of(cell_of(fminf(fmaxf(threshold, -1.0f), 1.0f))) : INT16_MAX;
    if (thread == 0) tables.most_in_cell = 0;
    __syncthreads();
    if (threshold >= 0 && (thread == 0 || tables.thresholds[thread - 1] < 0)) tables.zero = thread;
    fill_cells(tables, thread * kRun - kCells, min((thread + 1) * kRun, 2 * kCells) - kCells);
  }

  // The codes of values from -1 to 1, or as much beyond as rounding brings them.
  template <int count>
  static __device__ void encode(const Tables& tables, const float (&x)[count], uint32_t (&words)[count / 4]) {
    uint32_t codes[count];
#pragma unroll
    for (int i = 0; i < count; i++) {
      const uint32_t below = tables.below[cell_of(x[i])];
      codes[i] = below + (tables.thresholds[below] < x[i]);
    }
#pragma unroll 1
    for (int k = tables.most_in_cell; k > 1; k--) {
#pragma unroll
      for (int i = 0; i < count; i++) codes[i] += tables.thresholds[codes[i]] < x[i];
    }
#pragma unroll
    for (int i = 0; i < count; i += 4)
      words[i / 4] = codes[i] | codes[i + 1] << 8 | codes[i + 2] << 16 | codes[i + 3] << 24;
  }

 private:
  static __device__ int cell_of(float x) {
    const uint32_t magnitude = bits(fmaxf(fabsf(x), 0x1p-24f));
    return static_cast<int>((magnitude >> 16) - kFirst + (static_cast<uint32_t>(bits(x)) >> 31) * kCells);
  }

  // Cells by ascending values: from -kCells to kCells - 1.
  static __device__ int order_of(int cell) { return cell < kCells ? cell : kCells - 1 - cell; }
  static __device__ int cell_at(int order) { return order >= 0 ? order : kCells - 1 - order; }

  static __device__ void fill_cells(Tables& tables, int begin, int end) {
    int below = 0;
    for (int step = 128; step > 0; step /= 2) {
      if (tables.orders[below + step - 1] < begin) below += step;
    }
    int most = 0;
    for (int order = begin; order < end; order++) {
      tables.below[cell_at(order)] = static_cast<uint8_t>(below);
      const int before = below;
      while (tables.orders[below] <= order) below++;
      most = max(most, below - before);
    }
    atomicMax(&tables.most_in_cell, most);
  }
};

// Whether a multiply-add may find other cells for the thresholds of a codebook than a product and a sum:
// where one is so near a cell's end that it depends on the rounding of the product.
constexpr bool cells_depend_on_rounding() {
  for (const Format4bit& format : kFormats) {
    if (format.encoder != Encoder::nearest) continue;
    for (int k = 0; k + 1 < 16; k++) {
      const double place = double{midpoint(format.codebook, k)} * kUniformScale + kUniformCells + 0.5;
      const double from_end = place - static_cast<int>(place);
      if (from_end < 1e-4 || from_end > 1 - 1e-4) return true;
    }
  }
  return false;
}
static_assert(!cells_depend_on_rounding(), "a threshold is at the end of its cell");

// For a short codebook whose thresholds are more than 1/15 apart: cells of equal width, 31 of them, which no
// two lanes look up in the same bank unless they look up the same one.
template <Encoder kind>
class ShortEncoder {
 public:
  struct Source {
    UniformCellTable cells;
    int zero;                // the code of 0.0
    uint32_t code_of_ranks;  // of magnitudes, four bits each
  };

  struct Tables {
    float thresholds[kUniformTable];  // of the cells from the lowest values on
    int32_t below[kUniformTable];
    int zero;
    uint32_t code_of_ranks;
  };
  static constexpr int kBits = 4;
  static constexpr bool kTakesNan = false;

  static Source source(const Format4bit& format) {
    if (kind == Encoder::nearest) return {uniform_cell_table(format.codebook, 16), format.zero, 0};
    const AscendingMagnitudes magnitudes = ascending_magnitudes(format);
    uint32_t code_of_ranks = 0;
    for (int rank = 0; rank < 8; rank++) code_of_ranks |= magnitudes.codes[rank] << 4 * rank;
    return {uniform_cell_table(magnitudes.values, 8), format.zero, code_of_ranks};
  }

  // Called by all threads of a block; needs a barrier behind.
  static __device__ void prepare(Tables& tables, const Source& source) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= kUniformTable) return;
    const int cell = (thread - kMiddle) & (kUniformTable - 1);
    tables.thresholds[thread] = source.cells.thresholds[cell];
    tables.below[thread] = source.cells.below[cell];
    if (thread > 0) return;
    tables.zero = source.zero;
    tables.code_of_ranks = source.code_of_ranks;
  }

  // The codes of values from -1 to 1, or as much beyond as rounding brings them, two to a byte, the first in
  // the high nibble.
  template <int count>
  static __device__ void encode(const Tables& tables, const float (&x)[count], uint32_t (&words)[count / 8]) {
#pragma unroll
    for (int w = 0; w < count / 8; w++) {
      uint32_t codes = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) codes = codes * 16 + code_of(tables, x[8 * w + i]);
      words[w] = __byte_perm(codes, 0, 0x0123);
    }
  }

 private:
  static __device__ uint32_t code_of(const Tables& tables, float x) {
    if (kind == Encoder::nearest) return count_below(tables, x);
    const uint32_t rank = count_below(tables, fabsf(x));
    return (tables.code_of_ranks >> 4 * rank & 7) | (x < 0 ? 8 : 0);
  }

  // How many thresholds lie below x: those below its cell, and the one in it if their difference is negative.
  // The shift is 2 in place of 2^23, so that the sum's bits, as an offset into a table, need no subtraction.
  static __device__ uint32_t count_below(const Tables& tables, float x) {
    constexpr float unit = 0x1p-22f, scale = kUniformScale * unit, shift = 2 + kMiddle * unit;
    const float place = kind == Encoder::nearest ? fmaf(x, scale, shift) : x * scale + shift;
    const uint32_t cell = bits(place) - 0x40000000;
    return tables.below[cell] + (static_cast<uint32_t>(bits(tables.thresholds[cell] - x)) >> 31);
  }

  static constexpr int kMiddle = kUniformTable / 2;  // the cell of 0
};

// Whether a block whose largest magnitude is that, as bits, can be scaled by it: neither zero nor non-finite.
__device__ inline bool is_scalable(int32_t largest) {
  return largest >= kSmallestNormal && largest < kInfinity;
}

// What a block stores as its absmax.
__device__ inline float stored_absmax(int32_t largest) {
  if (largest < kSmallestNormal) return 0.0f;
  return from_bits(largest > kInfinity ? kNan : largest);
}

// What values of a block with that largest magnitude are multiplied by; 0 where it cannot be scaled.
__device__ inline float inverse_of(int32_t largest) {
  if (__builtin_expect(largest >= kSmallestNormal && largest < kEndOfQuickReciprocals, true))
    return quick_reciprocal(from_bits(largest));
  return is_scalable(largest) ? 1.0f / from_bits(largest) : 0.0f;
}

// The codes of values of a block with that largest magnitude: all that of 0.0 where it cannot be scaled.
// Codes of 4 bits go two to a byte, the first in the high nibble.
template <class AnyEncoder, int count>
__device__ inline void encode_block(const typename AnyEncoder::Tables& tables, int32_t largest,
                                    const float (&values)[count],
                                    uint32_t (&words)[count * AnyEncoder::kBits / 32]) {
  const float inverse = inverse_of(largest);
  float scaled[count];
#pragma unroll
  for (int i = 0; i < count; i++) scaled[i] = values[i] * inverse;
  const bool scalable = is_scalable(largest);
  if (AnyEncoder::kTakesNan || __builtin_expect(scalable, true)) AnyEncoder::encode(tables, scaled, words);
  if (!scalable) {
#pragma unroll
    for (uint32_t& word : words) word = tables.zero * (AnyEncoder::kBits == 8 ? 0x01010101u : 0x11111111u);
  }
}

}  // namespace bnb
