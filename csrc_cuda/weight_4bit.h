// A 4-bit weight as the checkpoint stores it: codes, two to a byte, and the scale of each block.
#pragma once

#include "../csrc_shared/codebooks.h"
#include "block_scales.h"
#include "elements.h"

namespace bnb {

// The 16 values of a 4-bit code.
struct Codebook4bit {
  float values[16];
};

inline Codebook4bit codebook_4bit(QuantType quant_type) {
  Codebook4bit codebook;
  for (int i = 0; i < 16; i++) codebook.values[i] = quant_type == QuantType::nf4 ? kNf4Code[i] : kFp4Code[i];
  return codebook;
}

// The same for a caller who has them in the device's memory.
struct StoredCodebook4bit {
  const float* values;
};

// W[N, K], whose blocks run over the flat weight.
struct Weight4bit {
  const uint8_t* packed;
  StoredScales scales;
  int64_t N, K;
  int blocksize_log2;
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

  __device__ static void decode(const Weight4bit& weight, LaneCodebook codebook, int64_t n, int64_t k,
                                float (&w)[kChunk]) {
    const int64_t first = n * weight.K + k;
    const uint32_t codes = *reinterpret_cast<const uint32_t*>(weight.packed + first / 2);
    const float scale = weight.scales.of_block(first >> weight.blocksize_log2);
#pragma unroll
    for (int i = 0; i < kChunk; i++) w[i] = codebook[codes >> (4 * (i ^ 1)) & 15] * scale;
  }
};

// The same for any K and any address: a row may start inside a byte, the codes may lie in two blocks, and
// those past the row's end are taken as 0.
struct AnyWeight {
  static constexpr int kUnroll = 1;

  __device__ static void decode(const Weight4bit& weight, LaneCodebook codebook, int64_t n, int64_t k,
                                float (&w)[kChunk]) {
    const int64_t first = n * weight.K + k;
    const int64_t valid = min(weight.K - k, static_cast<int64_t>(kChunk));
    const int64_t block = first >> weight.blocksize_log2;
    const int64_t last_block = (first + valid - 1) >> weight.blocksize_log2;
    const float scale = weight.scales.of_block(block);
    const float next_scale = last_block == block ? scale : weight.scales.of_block(last_block);
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
      w[i] = 0.0f;
      if (i >= valid) continue;
      const int64_t at = first + i;
      const uint32_t code = weight.packed[at / 2] >> (at % 2 ? 0 : 4) & 15;
      w[i] = codebook[code] * (at >> weight.blocksize_log2 == block ? scale : next_scale);
    }
  }
};

}  // namespace bnb
