// The state of an optimizer, in f32 or in blockwise 8 bits, as a warp reads and writes that of one block.
//
// Tables<name> is what the threads of a block of threads prepare in shared memory, before a barrier; `run` is how
// many neighbouring entries a thread should take for accesses of 16 bytes.
#pragma once

#include "../csrc_shared/optimizer_rules.h"
#include "encode.h"

namespace bnb {

// Of a block of entries each thread of a warp owns a few: runs of neighbours that move in one access, with the
// other threads' runs between them.
constexpr int kOwned = kOptimizerBlock / kWarp;

// Where the i-th entry that this thread owns is in the block.
template <int run>
__device__ inline int owned_index(int i) {
  return i / run * run * kWarp + lane() * run + i % run;
}

// The owned entries of the block at p, which has `valid` entries; those past its end are zeros.
template <int run, class T>
__device__ inline void load_owned(const T* p, int64_t valid, T (&values)[kOwned]) {
#pragma unroll
  for (int i = 0; i < kOwned; i += run) {
    const int index = owned_index<run>(i);
    T part[run];
    load(p + index, valid - index, part);
#pragma unroll
    for (int j = 0; j < run; j++) values[i + j] = part[j];
  }
}
template <int run, class T>
__device__ inline void store_owned(T* p, int64_t valid, const T (&values)[kOwned]) {
#pragma unroll
  for (int i = 0; i < kOwned; i += run) {
    const int index = owned_index<run>(i);
    T part[run];
#pragma unroll
    for (int j = 0; j < run; j++) part[j] = values[i + j];
    store(p + index, valid - index, part);
  }
}

using OwnedState = float[kStates][kOwned];

struct FloatState {
  float* values[kStates];

  template <class T>
  static constexpr int run = kAccessBytes / sizeof(float);

  template <OptimizerName name>
  struct Tables {
    __device__ void prepare(const FloatState&) {}
  };

  template <OptimizerName name, int run>
  __device__ void load(const Tables<name>&, int64_t block, int64_t valid, OwnedState& owned) const {
#pragma unroll
    for (int s = 0; s < kStates; s++) {
      if (uses_state(name, s)) load_owned<run>(values[s] + block * kOptimizerBlock, valid, owned[s]);
    }
  }
  template <OptimizerName name, int run>
  __device__ void store(const Tables<name>&, int64_t block, int64_t valid, OwnedState& owned) const {
#pragma unroll
    for (int s = 0; s < kStates; s++) {
      if (uses_state(name, s)) store_owned<run>(values[s] + block * kOptimizerBlock, valid, owned[s]);
    }
  }
};

struct ByteState {
  uint8_t* codes[kStates];
  float* absmax[kStates];
  const float* maps[2];  // of the first moments and of the second one

  template <class T>
  static constexpr int run = kAccessBytes / sizeof(T);

  template <OptimizerName name>
  struct Tables {
    static constexpr int kMaps = uses_state(name, 2) ? 2 : 1;
    CellEncoder::Tables encoding[kMaps];
    float code[kMaps][256];

    __device__ void prepare(const ByteState& state) {
#pragma unroll
      for (int m = 0; m < kMaps; m++) {
        CellEncoder::prepare(encoding[m], state.maps[m]);
        for (int i = static_cast<int>(threadIdx.x); i < 256; i += static_cast<int>(blockDim.x)) {
          code[m][i] = state.maps[m][i];
        }
      }
    }
  };

  template <OptimizerName name, int run>
  __device__ void load(const Tables<name>& tables, int64_t block, int64_t valid, OwnedState& owned) const {
#pragma unroll
    for (int s = 0; s < kStates; s++) {
      if (!uses_state(name, s)) continue;
      uint8_t bytes[kOwned];
      load_owned<run>(codes[s] + block * kOptimizerBlock, valid, bytes);
      const float scale = absmax[s][block];
#pragma unroll
      for (int i = 0; i < kOwned; i++) owned[s][i] = tables.code[map_of(s)][bytes[i]] * scale;
    }
  }

  template <OptimizerName name, int run>
  __device__ void store(const Tables<name>& tables, int64_t block, int64_t valid, OwnedState& owned) const {
#pragma unroll
    for (int s = 0; s < kStates; s++) {
      if (!uses_state(name, s)) continue;
      float(&values)[kOwned] = owned[s];
      if (valid < kOptimizerBlock) {
#pragma unroll
        for (int i = 0; i < kOwned; i++) values[i] = owned_index<run>(i) < valid ? values[i] : 0.0f;
      }
      int32_t largest = 0;
#pragma unroll
      for (int i = 0; i < kOwned; i++) largest = max(largest, magnitude_bits(values[i]));
      largest = warp_max(largest);
      const CellEncoder::Tables& encoding = tables.encoding[map_of(s)];
      int found[kOwned];
      encode_scaled<CellEncoder>(encoding, largest, values, found);
      const bool raises = divides_by(name, s) && is_scalable(largest);
      uint8_t bytes[kOwned];
#pragma unroll
      for (int i = 0; i < kOwned; i++) {
        // A positive value takes the smallest positive code rather than that of zero: it will be divided by.
        const bool raised = raises && found[i] == encoding.zero && values[i] > 0;
        bytes[i] = static_cast<uint8_t>(found[i] + raised);
      }
      store_owned<run>(codes[s] + block * kOptimizerBlock, valid, bytes);
      if (lane() == 0) absmax[s][block] = stored_absmax(largest);
    }
  }

 private:
  static __device__ int map_of(int s) { return s == 2 ? 1 : 0; }
};

}  // namespace bnb
