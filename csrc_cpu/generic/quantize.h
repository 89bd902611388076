// Blockwise quantization to 256-entry and 4-bit codebooks, and back (docs/SPEC.md section 2).
#pragma once

#include "common.h"

namespace bnb::BNB_TARGET {
namespace {

// The levels of a binary search over 2^depth - 1 ascending thresholds, stored breadth first. Branch-free: the
// upper levels are lookups in registers.
template <int level, int depth>
class SearchLevels {
 public:
  explicit SearchLevels(const float* thresholds)
      : pivots_(thresholds + (1 << level) - 1), below_(thresholds) {}
  BNB_INLINE I32 descend(I32 rank, F32 x) const {
    return below_.descend(increment(rank + rank, less(pivots_[rank], x)), x);
  }

 private:
  Table<1 << level> pivots_;
  SearchLevels<level + 1, depth> below_;
};

template <int depth>
class SearchLevels<depth, depth> {
 public:
  explicit SearchLevels(const float*) {}
  BNB_INLINE I32 descend(I32 rank, F32) const { return rank; }
};

// The thresholds of an ascending codebook of 2^depth entries, in the order that SearchLevels reads.
template <int depth>
struct Thresholds {
  float values[1 << depth];
  explicit Thresholds(const float* code) {
    for (int level = 0; level < depth; level++) {
      const int stride = 1 << (depth - level);
      for (int k = 0; k < 1 << level; k++) {
        values[(1 << level) - 1 + k] = midpoint(code, k * stride + stride / 2 - 1);
      }
    }
  }
};

// An encoder turns scaled values into codes; `zero` is its code of 0.0.

class BlockwiseEncoder {
 public:
  BlockwiseEncoder(const Thresholds<8>& thresholds, int zero) : zero(zero), levels_(thresholds.values) {}
  BNB_INLINE I32 operator()(F32 x) const { return levels_.descend(I32{}, x); }
  const int zero;

 private:
  SearchLevels<0, 8> levels_;
};

class Nf4Encoder {
 public:
  explicit Nf4Encoder(const Thresholds<4>& thresholds) : levels_(thresholds.values) {}
  BNB_INLINE I32 operator()(F32 x) const { return levels_.descend(I32{}, x); }
  static constexpr int zero = kNf4Zero;

 private:
  SearchLevels<0, 4> levels_;
};

class Fp4Encoder {
 public:
  explicit Fp4Encoder(const Thresholds<3>& thresholds) : levels_(thresholds.values) {}
  BNB_INLINE I32 operator()(F32 x) const {
    const I32 rank = levels_.descend(I32{}, abs(x));
    const I32 code = rank ^ ((rank & 2) << 1);  // fp4_code_of_rank
    return select(less(x, F32{}), code | 8, code);
  }
  static constexpr int zero = kFp4Zero;

 private:
  SearchLevels<0, 3> levels_;
};

// The entry nearest 0.0, the lower of two equally near.
int zero_code(const float* code) {
  int nearest = 0;
  for (int i = 1; i < 256; i++) {
    if (__builtin_fabsf(code[i]) < __builtin_fabsf(code[nearest])) nearest = i;
  }
  return nearest;
}

template <class T>
int32_t absmax_bits(const T* a, int64_t n) {
  I32 largest{};
  for_each_vector(n, [&](int64_t i, auto lanes) { largest = max(largest, bits(abs(load(a + i, lanes)))); });
  return reduce_max(largest);
}

// Where a block's codes go: a byte each, or two a byte with the first in the high nibble, where a last byte
// that is half empty is filled with `zero`.

struct Bytes {
  uint8_t* out;
  void fill(int code, int64_t n) const { __builtin_memset(out, code, n); }
  template <class Lanes>
  BNB_INLINE void put(int64_t i, I32 codes, Lanes lanes) const {
    store(out + i, codes, lanes);
  }
};

struct Nibbles {
  uint8_t* out;
  int zero;
  void fill(int code, int64_t n) const {
    __builtin_memset(out, code << 4 | code, n / 2);
    if (n % 2) out[n / 2] = static_cast<uint8_t>(code << 4 | zero);
  }
  BNB_INLINE void put(int64_t i, I32 codes, AllLanes) const { store_nibbles(out + i / 2, codes); }
  BNB_INLINE void put(int64_t i, I32 codes, int lanes) const {
    if (lanes % 2) codes[lanes] = zero;
    uint8_t packed[kLanes / 2];
    store_nibbles(packed, codes);
    __builtin_memcpy(out + i / 2, packed, (lanes + 1) / 2);
  }
};

// Quantizes one block and returns its absmax.
template <class T, class Encoder, class Output>
float quantize_block(const T* a, int64_t n, const Encoder& encode, const Output& output) {
  const int32_t largest = absmax_bits(a, n);
  if (largest < kSmallestNormal || largest >= kInfinity) {
    output.fill(encode.zero, n);
    return largest < kSmallestNormal ? 0.0f : float_from_bits(largest > kInfinity ? kNan : kInfinity);
  }
  const float absmax = float_from_bits(largest);
  const F32 inverse = splat(1.0f / absmax);
  for_each_vector(n,
                  [&](int64_t i, auto lanes) { output.put(i, encode(load(a + i, lanes) * inverse), lanes); });
  return absmax;
}

template <class T>
void dequantize_block(const uint8_t* q, float absmax, const Table<256>& code, int64_t n, T* out) {
  const F32 scale = splat(absmax);
  for_each_vector(n, [&](int64_t i, auto lanes) { store(out + i, code[load(q + i, lanes)] * scale, lanes); });
}

void quantize_blockwise(const void* A, DType dtype, int64_t n, const float* code, int64_t blocksize,
                        uint8_t* q, float* absmax, Stream) {
  const Thresholds<8> thresholds(code);
  const int zero = zero_code(code);
  with_type(dtype, A, [&](auto* a) {
    parallel_for(ceil_div(n, blocksize), grain(blocksize), [&](int64_t begin, int64_t end) {
      const BlockwiseEncoder encode(thresholds, zero);
      for (int64_t b = begin; b < end; b++) {
        const int64_t first = b * blocksize;
        absmax[b] = quantize_block(a + first, min(blocksize, n - first), encode, Bytes{q + first});
      }
    });
  });
}

void dequantize_blockwise(const uint8_t* q, const float* absmax, const float* code, int64_t n,
                          int64_t blocksize, void* out, DType dtype, Stream) {
  with_type(dtype, out, [&](auto* y) {
    parallel_for(ceil_div(n, blocksize), grain(blocksize), [&](int64_t begin, int64_t end) {
      const Table<256> table(code);
      for (int64_t b = begin; b < end; b++) {
        const int64_t first = b * blocksize;
        dequantize_block(q + first, absmax[b], table, min(blocksize, n - first), y + first);
      }
    });
  });
}

template <class T, class Encoder>
void quantize_4bit_blocks(const T* a, int64_t n, int64_t blocksize, const Encoder& encode, int64_t begin,
                          int64_t end, uint8_t* packed, float* absmax) {
  for (int64_t b = begin; b < end; b++) {
    const int64_t first = b * blocksize;
    const Nibbles output{packed + first / 2, encode.zero};
    absmax[b] = quantize_block(a + first, min(blocksize, n - first), encode, output);
  }
}

void quantize_4bit(const void* A, DType dtype, int64_t n, int64_t blocksize, QuantType quant_type,
                   uint8_t* packed, float* absmax, Stream) {
  const Thresholds<4> nf4(kNf4Code);
  const Thresholds<3> fp4(kFp4AscendingMagnitudes);
  with_type(dtype, A, [&](auto* a) {
    parallel_for(ceil_div(n, blocksize), grain(blocksize), [&](int64_t begin, int64_t end) {
      if (quant_type == QuantType::nf4) {
        quantize_4bit_blocks(a, n, blocksize, Nf4Encoder(nf4), begin, end, packed, absmax);
      } else {
        quantize_4bit_blocks(a, n, blocksize, Fp4Encoder(fp4), begin, end, packed, absmax);
      }
    });
  });
}

const float* codebook(QuantType quant_type) { return quant_type == QuantType::nf4 ? kNf4Code : kFp4Code; }

// `packed` starts at the block's first element.
template <class T>
void dequantize_4bit_block(const uint8_t* packed, float absmax, const Table<16>& code, int64_t n, T* out) {
  const F32 scale = splat(absmax);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, code[load_nibbles(packed + i / 2)] * scale);
  if (i == n) return;
  uint8_t tail[kLanes / 2] = {};
  __builtin_memcpy(tail, packed + i / 2, (n - i + 1) / 2);
  store(out + i, code[load_nibbles(tail)] * scale, static_cast<int>(n - i));
}

void dequantize_4bit(const uint8_t* packed, const float* absmax, int64_t n, int64_t blocksize,
                     QuantType quant_type, void* out, DType dtype, Stream) {
  with_type(dtype, out, [&](auto* y) {
    parallel_for(ceil_div(n, blocksize), grain(blocksize), [&](int64_t begin, int64_t end) {
      const Table<16> code(codebook(quant_type));
      for (int64_t b = begin; b < end; b++) {
        const int64_t first = b * blocksize;
        dequantize_4bit_block(packed + first / 2, absmax[b], code, min(blocksize, n - first), y + first);
      }
    });
  });
}

}  // namespace
}  // namespace bnb::BNB_TARGET
