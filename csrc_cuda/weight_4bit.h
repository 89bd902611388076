// A 4-bit weight as the checkpoint stores it: codes, two to a byte, and the scale of each block.
#pragma once

#include <iterator>
#include <type_traits>

#include "block_scales.h"
#include "elements.h"

namespace bnb {

// What codes are multiplied by before they are rounded to a half precision, and sums of them to undo it.
struct CodeFactor {
  float of_codes = 1.0f, of_sums = 1.0f;
};

// The values of a format's codes, with its factor for a dtype.
struct Codebook4bit {
  float values[16];
  CodeFactor factor;
};

template <class T>
Codebook4bit codebook_for(const Format4bit& format) {
  Codebook4bit codebook = {};
  for (int code = 0; code < 16; code++) codebook.values[code] = format.codebook[code];
  float factor = 1.0f;
  if (std::is_same_v<T, __half>) factor = format.f16_factor;
  if (std::is_same_v<T, __nv_bfloat16>) factor = format.bf16_factor;
  codebook.factor = {factor, 1.0f / factor};
  return codebook;
}

// Values in the device's memory, which may be those of any of the formats.
struct StoredCodebook4bit {
  const float* values;
  Codebook4bit known[std::size(kFormats)];
};

template <class T>
StoredCodebook4bit stored_codebook_for(const float* values) {
  StoredCodebook4bit codebook = {values, {}};
  for (size_t i = 0; i < std::size(kFormats); i++) codebook.known[i] = codebook_for<T>(kFormats[i]);
  return codebook;
}

// What kernels read of a weight W[N, K]: block sizes are shifts.
struct WeightView {
  const uint8_t* packed;
  StoredScales scales;
  int64_t N, K;
  int block_shift;

  explicit WeightView(const Weight4bit& weight)
      : packed(weight.packed),
        scales(weight.scales),
        N(weight.N),
        K(weight.K),
        block_shift(weight.block_shift()) {}
};

// A codebook in shared memory, once for each lane, so that no two lanes ever want the same bank.
struct LaneCodebook {
  const float* values;  // [16][32], from this thread's lane on

  __device__ float operator[](uint32_t code) const { return values[code * kWarp]; }
};
constexpr int kLaneCodebookSize = 16 * kWarp;

// The value of code lane() % 16: chosen among all of them, since an index that varies would move them to
// memory.
__device__ inline float value_of_lane(const Codebook4bit& codebook) {
  float value = codebook.values[0];
#pragma unroll
  for (int code = 1; code < 16; code++) {
    const float other = codebook.values[code];
    value = lane() % 16 == code ? other : value;
  }
  return value;
}

__device__ inline float value_of_lane(const StoredCodebook4bit& codebook) {
  return codebook.values[lane() % 16];
}

__device__ inline CodeFactor factor_of(const Codebook4bit& codebook) { return codebook.factor; }

// That of the format with these values, 1 if no format has them; every lane of the warp calls it.
__device__ inline CodeFactor factor_of(const StoredCodebook4bit& codebook) {
  const float value = value_of_lane(codebook);
  CodeFactor factor;
#pragma unroll
  for (const Codebook4bit& format : codebook.known) {
    const int is_same = value == value_of_lane(format);
    if (warp_reduce(is_same, [](int a, int b) { return a & b; })) factor = format.factor;
  }
  return factor;
}

// Fills `shared`; every thread of the block calls it, and a barrier follows before the first look-up.
template <class Codebook>
__device__ inline LaneCodebook make_lane_codebook(const Codebook& codebook, float* shared) {
  const float value = value_of_lane(codebook);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  for (int code = warp(); code < 16; code += warps) shared[code * kWarp + lane()] = shuffle(value, code);
  return {shared + lane()};
}

constexpr int kChunk = 8;  // neighbouring weights that a thread decodes at once

// Eight codes of one row, which starts at a multiple of four bytes, in one load.
struct AlignedWeight {
  static constexpr int kUnroll = 2;  // chunks worth loading at a time

  static bool fits(const WeightView& weight) {
    return weight.K % kChunk == 0 && is_aligned(weight.packed, sizeof(uint32_t));
  }

  __device__ static void decode(const WeightView& weight, LaneCodebook codebook, int64_t n, int64_t k,
                                float (&w)[kChunk]) {
    const int64_t first = n * weight.K + k;
    const uint32_t codes = *reinterpret_cast<const uint32_t*>(weight.packed + first / 2);
    const float scale = weight.scales.of_block(first >> weight.block_shift);
#pragma unroll
    for (int i = 0; i < kChunk; i++) w[i] = codebook[codes >> (4 * (i ^ 1)) & 15] * scale;
  }
};

// The same for any K and any address: a row may start inside a byte, the codes may lie in two blocks, and
// those past the row's end are taken as 0.
struct AnyWeight {
  static constexpr int kUnroll = 1;

  __device__ static void decode(const WeightView& weight, LaneCodebook codebook, int64_t n, int64_t k,
                                float (&w)[kChunk]) {
    const int64_t first = n * weight.K + k;
    const int64_t valid = min(weight.K - k, static_cast<int64_t>(kChunk));
    const int64_t block = first >> weight.block_shift;
    const int64_t last_block = (first + valid - 1) >> weight.block_shift;
    const float scale = weight.scales.of_block(block);
    const float next_scale = last_block == block ? scale : weight.scales.of_block(last_block);
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
      w[i] = 0.0f;
      if (i >= valid) continue;
      const int64_t at = first + i;
      const uint32_t code = weight.packed[at / 2] >> (at % 2 ? 0 : 4) & 15;
      w[i] = codebook[code] * (at >> weight.block_shift == block ? scale : next_scale);
    }
  }
};

}  // namespace bnb
