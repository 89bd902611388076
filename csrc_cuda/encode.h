// Turns values scaled to [-1, 1] into codes: the number of thresholds below them, where a threshold lies
// midway between neighbouring entries of the codebook (docs/SPEC.md section 2).
//
// An encoder has a Source, which the host gives, and Tables in shared memory, which the threads of a block make
// from it; `encode` wants them complete, and so comes after a barrier.
#pragma once

#include "../csrc_shared/codebooks.h"
#include "elements.h"

namespace bnb {

// For 256 entries in any ascending order. A table tells how many thresholds lie below the cell of a value: the
// values whose sign, exponent and first seven mantissa bits agree. Those in the cell are compared with, of
// which there is one at most for every map in use.
class CellEncoder {
 public:
  using Source = const float*;  // f32[256]
  static constexpr int kBits = 8;

  struct Tables {
    float thresholds[256];  // the last one is above all values
    uint8_t below[2 * (24 << 7)];
    int most_in_cell;
    int zero;  // the code of 0.0
  };

  // Called by all threads of a block; has a barrier inside, and needs one behind.
  static __device__ void prepare(Tables& tables, Source code) {
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    for (int j = thread; j < 256; j += threads) {
      tables.thresholds[j] = j < kThresholds ? midpoint(code, j) : from_bits(kInfinity);
    }
    if (thread == 0) tables.most_in_cell = 0;
    __syncthreads();
    for (int j = thread; j < 256; j += threads) {
      const bool above_last = j == 0 || tables.thresholds[j - 1] < 0;
      if (above_last && tables.thresholds[j] >= 0) tables.zero = j;
    }
    const int run = kCells / threads;
    int most = 0;
    int below = thresholds_below_cell(tables, thread * run);
    for (int cell = thread * run; cell < (thread + 1) * run; cell++) {
      tables.below[cell] = static_cast<uint8_t>(below);
      const int before = below;
      while (below < kThresholds && cell_of(tables.thresholds[below]) <= cell) below++;
      most = max(most, below - before);
    }
    atomicMax(&tables.most_in_cell, most);
  }

  template <int count>
  static __device__ void encode(const Tables& tables, const float (&x)[count], int (&codes)[count]) {
#pragma unroll
    for (int i = 0; i < count; i++) codes[i] = tables.below[cell_of(x[i])];
#pragma unroll 1
    for (int k = tables.most_in_cell; k > 0; k--) {
#pragma unroll
      for (int i = 0; i < count; i++) codes[i] += tables.thresholds[codes[i]] < x[i];
    }
  }

 private:
  static constexpr int kThresholds = 255;
  static constexpr int kHalf = 24 << 7;  // cells of one sign: magnitudes from 2^-24, smaller ones in the first
  static constexpr int kCells = 2 * kHalf;
  static constexpr int kEnd = 127 << 7;  // the cell of 1.0

  static __device__ int cell_of(float x) {
    const int32_t magnitude = min(max(magnitude_bits(x) >> 16, kEnd - kHalf), kEnd - 1) - (kEnd - kHalf);
    return kHalf + (magnitude ^ (bits(x) >> 31));
  }

  static __device__ int thresholds_below_cell(const Tables& tables, int cell) {
    int below = 0;
    for (int step = 128; step > 0; step /= 2) {
      if (cell_of(tables.thresholds[below + step - 1]) < cell) below += step;
    }
    return below;
  }
};

// For a short codebook whose thresholds are more than 1/15 apart: cells of equal width, 31 of them, which no
// two lanes look up in the same bank unless they look up the same one.
struct UniformCells {
  static constexpr int kTable = 32;
  float thresholds[kTable];
  int32_t below[kTable];

  template <int entries>
  static UniformCells of(const float (&ascending)[entries]) {
    UniformCells cells = {};
    int k = 0;
    for (int cell = -kCells / 2; cell <= kCells / 2; cell++) {
      const bool inside = k < entries - 1 && centred(midpoint(ascending, k)) == cell;
      cells.thresholds[cell & (kTable - 1)] = inside ? midpoint(ascending, k) : 2.0f;
      cells.below[cell & (kTable - 1)] = k;
      k += inside;
    }
    return cells;
  }

  __device__ int count_below(float x) const {
    const int cell = bits(x * kScale + kShift) & (kTable - 1);
    return below[cell] + (thresholds[cell] < x);
  }

 private:
  static constexpr int kCells = 31;
  static constexpr float kScale = kCells / 2;
  static constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: the sum ends in the integer nearest to x * kScale

  static int centred(float x) { return static_cast<int>(x * kScale + kShift - kShift); }
};

template <QuantType quant_type>
class ShortEncoder {
 public:
  using Source = UniformCells;
  using Tables = UniformCells;
  static constexpr int kBits = 4;

  static Source source() {
    return quant_type == QuantType::nf4 ? UniformCells::of(kNf4Code) : UniformCells::of(kFp4AscendingMagnitudes);
  }

  // Called by all threads of a block; needs a barrier behind.
  static __device__ void prepare(Tables& tables, const Source& cells) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= UniformCells::kTable) return;
    tables.thresholds[thread] = cells.thresholds[thread];
    tables.below[thread] = cells.below[thread];
  }

  template <int count>
  static __device__ void encode(const Tables& tables, const float (&x)[count], int (&codes)[count]) {
#pragma unroll
    for (int i = 0; i < count; i++) {
      if constexpr (quant_type == QuantType::nf4) {
        codes[i] = tables.count_below(x[i]);
      } else {
        codes[i] = fp4_code_of_rank(tables.count_below(fabsf(x[i]))) | (x[i] < 0 ? 8 : 0);
      }
    }
  }
};

// Whether a block whose largest magnitude is that, as bits, can be scaled by it: neither zero nor non-finite.
__device__ inline bool is_scalable(int32_t largest) { return largest >= kSmallestNormal && largest < kInfinity; }

// What a block stores as its absmax.
__device__ inline float stored_absmax(int32_t largest) {
  if (largest < kSmallestNormal) return 0.0f;
  return from_bits(largest > kInfinity ? kNan : largest);
}

// The codes of values of a block with that largest magnitude: all that of 0.0 where it cannot be scaled.
template <class Encoder, int count>
__device__ inline void encode_scaled(const typename Encoder::Tables& tables, int32_t largest,
                                     const float (&values)[count], int (&codes)[count]) {
  const bool scalable = is_scalable(largest);
  const float inverse = 1.0f / from_bits(largest);
  float scaled[count];
#pragma unroll
  for (int i = 0; i < count; i++) scaled[i] = scalable ? values[i] * inverse : 0.0f;
  Encoder::encode(tables, scaled, codes);
}

}  // namespace bnb
