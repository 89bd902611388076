// Turns values scaled to [-1, 1] into codes: the number of thresholds below them, where a threshold lies
// midway between neighbouring entries of the codebook (docs/SPEC.md section 2).
//
// A class of encoders has a Source, which the host gives, and Tables in shared memory, which the threads of a
// block make from it; `encode` wants them complete, and so comes after a barrier.
#pragma once

#include <cstring>

#include "../csrc_shared/uniform_cells.h"
#include "elements.h"

namespace bnb {

// For 256 entries in any ascending order, in blocks of 256 threads. A table tells how many thresholds lie
// below the cell of a value: the values whose sign, exponent and first seven mantissa bits agree. Those in
// the cell are compared with; every map in use has one of them at most.
class CellEncoder {
 public:
  using Source = const float*;  // f32[256]
  static constexpr int kBits = 8;
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
    int zero;              // the code of 0.0
    float least_positive;  // what it takes to get another code than that
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
    if (threshold >= 0 && (thread == 0 || tables.thresholds[thread - 1] < 0)) {
      tables.zero = thread;
      tables.least_positive = from_bits(bits(fabsf(threshold)) + 1);
    }
    fill_cells(tables, thread * kRun - kCells, min((thread + 1) * kRun, 2 * kCells) - kCells);
  }

  // For values from -1 to 1, or as much beyond as rounding brings them. The code of a NaN is undefined.
  template <int count>
  static __device__ void encode(const Tables& tables, const float (&x)[count], int (&codes)[count]) {
#pragma unroll
    for (int i = 0; i < count; i++) {
      const int below = tables.below[cell_of(x[i])];
      codes[i] = tables.thresholds[below] < x[i] ? below + 1 : below;
    }
#pragma unroll 1
    for (int k = tables.most_in_cell; k > 1; k--) {
#pragma unroll
      for (int i = 0; i < count; i++) codes[i] += tables.thresholds[codes[i]] < x[i];
    }
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

// For a short codebook whose thresholds are more than 1/15 apart: cells of equal width, 31 of them, which no
// two lanes look up in the same bank unless they look up the same one.
template <Encoder kind>
class ShortEncoder {
 public:
  struct Tables : UniformCellTable {
    int zero;                // the code of 0.0
    uint32_t code_of_ranks;  // of magnitudes, four bits each

    __device__ int count_below(float x) const {
      const int cell = bits(x * kUniformScale + kUniformShift) & (kUniformTable - 1);
      return below[cell] + (thresholds[cell] < x);
    }
  };
  using Source = Tables;
  static constexpr int kBits = 4;

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
    tables.thresholds[thread] = source.thresholds[thread];
    tables.below[thread] = source.below[thread];
    if (thread > 0) return;
    tables.zero = source.zero;
    tables.code_of_ranks = source.code_of_ranks;
  }

  template <int count>
  static __device__ void encode(const Tables& tables, const float (&x)[count], int (&codes)[count]) {
#pragma unroll
    for (int i = 0; i < count; i++) {
      if constexpr (kind == Encoder::nearest) {
        codes[i] = tables.count_below(x[i]);
      } else {
        const int rank = tables.count_below(fabsf(x[i]));
        codes[i] = (tables.code_of_ranks >> 4 * rank & 7) | (x[i] < 0 ? 8 : 0);
      }
    }
  }
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

// The codes of values of a block with that largest magnitude: all that of 0.0 where it cannot be scaled.
// Codes of 4 bits go two to a byte, the first in the high nibble.
//
// With `raises`, a positive value takes the smallest positive code rather than that of 0.0.
template <class AnyEncoder, bool raises = false, int count>
__device__ inline void encode_block(const typename AnyEncoder::Tables& tables, int32_t largest,
                                    const float (&values)[count],
                                    uint8_t (&bytes)[count * AnyEncoder::kBits / 8]) {
  constexpr int bits = AnyEncoder::kBits, each = 32 / bits;
  float least_positive = 0;
  if constexpr (raises) least_positive = tables.least_positive;
  const bool scalable = is_scalable(largest);
  const float inverse = scalable ? 1.0f / from_bits(largest) : 0.0f;
  float scaled[count];
#pragma unroll
  for (int i = 0; i < count; i++) {
    scaled[i] = values[i] * inverse;
    if (raises) scaled[i] = fmaxf(scaled[i], values[i] > 0 ? least_positive : scaled[i]);
  }
  int codes[count];
  AnyEncoder::encode(tables, scaled, codes);
  // Whole words, so that the choice costs one instruction for each.
  const uint32_t zeros = tables.zero * (bits == 8 ? 0x01010101u : 0x11111111u);
  uint32_t words[count / each];
#pragma unroll
  for (int w = 0; w < count / each; w++) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < each; i++) {
      word |= static_cast<uint32_t>(codes[w * each + i]) << (bits == 8 ? 8 * i : 4 * (i ^ 1));
    }
    words[w] = scalable ? word : zeros;
  }
  memcpy(bytes, words, sizeof bytes);
}

}  // namespace bnb
