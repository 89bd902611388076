// The state of an optimizer, in f32 or in blockwise 8 bits, as a warp reads and writes that of one block.
//
// Tables<name> is what the threads of a block of threads prepare of the codebooks in shared memory, before a
// barrier; `run` is how many neighbouring entries a thread should take for accesses of 16 bytes.
#pragma once

#include <type_traits>

#include "../csrc_shared/optimizer_rules.h"
#include "cell_words.h"

namespace bnb {

// Of a block of entries each thread of a warp owns a few: runs of neighbours that move in one access, with
// the other threads' runs between them.
constexpr int kOwned = kOptimizerBlock / kWarp;

// Where the i-th entry that this thread owns is in the block.
template <int run>
__device__ inline int owned_index(int i) {
  return i / run * run * kWarp + lane() * run + i % run;
}

// A block of entries: the i-th of an array, with `valid` entries, and `whole` if those are all and every
// array is aligned.
struct Block {
  int64_t index;
  int64_t valid;
  bool whole;

  template <class T>
  __device__ T* of(T* array) const {
    return array + index * kOptimizerBlock;
  }
};

// The owned entries of a block of an array; those past its end are zeros.
template <int run, class T>
__device__ inline void load_owned(const T* array, const Block& block, T (&values)[kOwned]) {
#pragma unroll
  for (int i = 0; i < kOwned; i += run) {
    const int index = owned_index<run>(i);
    T part[run];
    load(block.of(array) + index, block.whole, block.valid - index, part);
#pragma unroll
    for (int j = 0; j < run; j++) values[i + j] = part[j];
  }
}
template <int run, class T>
__device__ inline void store_owned(T* array, const Block& block, const T (&values)[kOwned]) {
#pragma unroll
  for (int i = 0; i < kOwned; i += run) {
    const int index = owned_index<run>(i);
    T part[run];
#pragma unroll
    for (int j = 0; j < run; j++) part[j] = values[i + j];
    store(block.of(array) + index, block.whole, block.valid - index, part);
  }
}

// The same for bytes, four to a word.
template <int run>
__device__ inline void load_bytes_owned(const uint8_t* array, const Block& block,
                                        uint32_t (&words)[kOwned / 4]) {
#pragma unroll
  for (int i = 0; i < kOwned; i += run) {
    const int index = owned_index<run>(i);
    uint32_t part[run / 4];
    load_bytes(block.of(array) + index, block.whole, block.valid - index, part);
#pragma unroll
    for (int j = 0; j < run / 4; j++) words[i / 4 + j] = part[j];
  }
}
template <int run>
__device__ inline void store_bytes_owned(uint8_t* array, const Block& block,
                                         const uint32_t (&words)[kOwned / 4]) {
#pragma unroll
  for (int i = 0; i < kOwned; i += run) {
    const int index = owned_index<run>(i);
    uint32_t part[run / 4];
#pragma unroll
    for (int j = 0; j < run / 4; j++) part[j] = words[i / 4 + j];
    store_bytes(block.of(array) + index, block.whole, block.valid - index, part);
  }
}

// The same for entries of any dtype as floats, rounded once when they are stored.
template <int run, class T>
__device__ inline void load_floats_owned(const T* array, const Block& block, float (&values)[kOwned]) {
  T entries[kOwned];
  load_owned<run>(array, block, entries);
  to_floats(entries, values);
}
template <int run, class T>
__device__ inline void store_floats_owned(T* array, const Block& block, const float (&values)[kOwned]) {
  T entries[kOwned];
#pragma unroll
  for (int i = 0; i < kOwned; i++) entries[i] = from_float<T>(values[i]);
  store_owned<run>(array, block, entries);
}

struct FloatState {
  using Stored = Parameter32bit;
  struct Codebooks {};

  float* values[kStates];

  explicit BNB_HOST_DEVICE FloatState(const Stored& parameter)
      : values{parameter.state1, parameter.state1 + parameter.n, parameter.state2} {}

  template <class T>
  static constexpr int run = kAccessBytes / sizeof(float);

  template <OptimizerName name>
  struct Tables {
    __device__ void prepare(const Codebooks&) {}
  };

  template <int run>
  BNB_HOST_DEVICE bool is_aligned(int s) const {
    return are_aligned<run>(values[s]);
  }

  template <int run, class Tables>
  __device__ void load(int s, const Tables&, const Block& block, float (&owned)[kOwned]) const {
    load_owned<run>(values[s], block, owned);
  }
  template <int run, class Tables>
  __device__ void store(int s, const Tables&, const Block& block, bool, const float (&owned)[kOwned]) const {
    store_owned<run>(values[s], block, owned);
  }
};

struct ByteState {
  using Stored = Parameter8bit;
  using Codebooks = StateCodebooks;

  uint8_t* codes[kStates];
  float* absmax[kStates];

  explicit BNB_HOST_DEVICE ByteState(const Stored& parameter)
      : codes{parameter.state1, parameter.state1 + parameter.n, parameter.state2},
        absmax{parameter.absmax1, parameter.absmax1 + ceil_div(parameter.n, kOptimizerBlock),
               parameter.absmax2} {}

  template <class T>
  static constexpr int run = kAccessBytes / sizeof(T);

  // Of one map: the first moments' is signed, the second moments' is not.
  template <bool is_signed>
  struct Map {
    using Encoder = CellWords<is_signed>;
    typename Encoder::Tables encoding;
    float code[256];

    __device__ void prepare(const float* codebook) {
      Encoder::prepare(encoding, codebook);
      code[threadIdx.x] = codebook[threadIdx.x];
    }
  };
  struct NoMap {};

  template <OptimizerName name>
  struct Tables {
    static constexpr bool kHasSecond = uses_state(name, 2);
    Map<true> first;
    std::conditional_t<kHasSecond, Map<false>, NoMap> second;

    __device__ void prepare(const Codebooks& codebooks) {
      first.prepare(codebooks.state1);
      if constexpr (kHasSecond) second.prepare(codebooks.state2);
    }
    // Calls f with the map of a state.
    template <class F>
    __device__ void with_map(int s, const F& f) const {
      if constexpr (kHasSecond) {
        if (s == 2) return f(second);
      }
      f(first);
    }
  };

  template <int run>
  BNB_HOST_DEVICE bool is_aligned(int s) const {
    return are_aligned<run>(codes[s]);
  }

  template <int run, class Tables>
  __device__ void load(int s, const Tables& tables, const Block& block, float (&owned)[kOwned]) const {
    uint32_t words[kOwned / 4];
    load_bytes_owned<run>(codes[s], block, words);
    const float scale = absmax[s][block.index];
    tables.with_map(s, [&](const auto& map) {
#pragma unroll
      for (int i = 0; i < kOwned; i++) owned[i] = map.code[byte_of(words[i / 4], i % 4)] * scale;
    });
  }

  // Where the update is divided by the state, a positive value takes the smallest positive code rather than
  // that of zero. Values past the end of the block are overwritten.
  template <int run, class Tables>
  __device__ void store(int s, const Tables& tables, const Block& block, bool is_divisor,
                        float (&owned)[kOwned]) const {
    if (!block.whole) {
#pragma unroll
      for (int i = 0; i < kOwned; i++) owned[i] = owned_index<run>(i) < block.valid ? owned[i] : 0.0f;
    }
    int32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kOwned; i++) largest = max(largest, magnitude_bits(owned[i]));
    largest = warp_max(largest);
    uint32_t words[kOwned / 4];
    tables.with_map(s, [&](const auto& map) {
      using Encoder = typename std::decay_t<decltype(map)>::Encoder;
      if (is_divisor) {
        Encoder::template encode<true>(map.encoding, largest, owned, words);
      } else {
        Encoder::template encode<false>(map.encoding, largest, owned, words);
      }
    });
    store_bytes_owned<run>(codes[s], block, words);
    if (lane() == 0) absmax[s][block.index] = stored_absmax(largest);
  }
};

}  // namespace bnb
