// The scales of the blocks of a 4-bit tensor, double-quantized or not.
#pragma once

#include "../csrc_shared/kernels.h"
#include "launch.h"

namespace bnb {

// A block's scale before it is decoded, so that it can be loaded well before it is used.
struct StoredScale {
  float scale;  // of the block, or of its code
  uint8_t code;
};

// Scales as dequantizing needs them when they are f32: what it takes to decode others costs registers.
struct F32Scales {
  const float* absmax;

  __device__ float load(int64_t block) const { return absmax[block]; }
  __device__ float offset() const { return 0.0f; }
  __device__ float decode(float scale, float) const { return scale; }
};

// Either kind.
class StoredScales {
 public:
  explicit StoredScales(const BlockScales& scales)
      : scales_(scales), nested_block_shift_(scales.codes ? log2_of(scales.nested_blocksize) : 0) {}

  __device__ StoredScale load(int64_t block) const {
    if (!scales_.codes) return {scales_.absmax[block], 0};
    return {scales_.nested_absmax[block >> nested_block_shift_], scales_.codes[block]};
  }
  // The same, given what was loaded for some block before, and that block's nested one (-1: none was): a
  // nested block's scale is loaded once.
  __device__ void load_next(int block, StoredScale& stored, int& nested_block) const {
    if (!scales_.codes) {
      stored.scale = scales_.absmax[block];
      return;
    }
    stored.code = scales_.codes[block];
    const int next = block >> nested_block_shift_;
    if (next != nested_block) stored.scale = scales_.nested_absmax[next];
    nested_block = next;
  }
  __device__ float offset() const { return scales_.codes ? *scales_.offset : 0.0f; }
  __device__ float decode(StoredScale stored, float offset) const {
    return decode(stored, offset, scales_.nested_code);
  }
  // By a copy of what nested_code() has.
  __device__ float decode(StoredScale stored, float offset, const float* nested_code) const {
    return scales_.codes ? nested_code[stored.code] * stored.scale + offset : stored.scale;
  }
  // f32[256], null where the scales are not double-quantized.
  __device__ const float* nested_code() const { return scales_.codes ? scales_.nested_code : nullptr; }
  __device__ float of_block(int64_t block) const { return decode(load(block), offset()); }

 private:
  BlockScales scales_;
  int nested_block_shift_;
};

}  // namespace bnb
