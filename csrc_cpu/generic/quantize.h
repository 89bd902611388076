// Blockwise quantization to 256-entry and 4-bit codebooks, and back (docs/SPEC.md section 2).
#pragma once

#include "encoders.h"
#include "weight_4bit.h"

namespace bnb::BNB_TARGET {
namespace {

inline int32_t absmax_bits(const float* a, int64_t n) {
  I32 largest{};
  for_each_vector(n, [&](int64_t i, auto lanes) { largest = max(largest, bits(abs(load(a + i, lanes)))); });
  return reduce_max(largest);
}
// Without their sign, the bits of f16 and bf16 order as their values do.
template <class T>
int32_t absmax_bits(const T* a, int64_t n) {
  constexpr int64_t kHalves = 2 * kLanes;
  I16 largest{};
  int64_t i = 0;
  for (; i + kHalves <= n; i += kHalves) {
    I16 magnitude;
    __builtin_memcpy(&magnitude, a + i, sizeof magnitude);
    magnitude &= 0x7fff;
    largest = magnitude > largest ? magnitude : largest;
  }
  T all[kHalves + kLanes] = {};
  __builtin_memcpy(all, &largest, sizeof largest);
  I32 widened = max(bits(load(all)), bits(load(all + kLanes)));
  for_each_vector(n - i,
                  [&](int64_t j, auto lanes) { widened = max(widened, bits(abs(load(a + i + j, lanes)))); });
  return reduce_max(widened);
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

// An encoder of other than single vectors has an overload of its own.
template <class T, class Encode, class Output>
BNB_INLINE void encode_values(const T* a, int64_t n, F32 inverse, const Encode& encode,
                              const Output& output) {
  for_each_vector(n,
                  [&](int64_t i, auto lanes) { output.put(i, encode(load(a + i, lanes) * inverse), lanes); });
}

// Quantizes one block, of which the bits of the absmax are known, and its inverse. Returns the absmax.
// Inline, so that the compiler sees that no byte that is written changes the encoder.
template <class T, class Encode, class Output>
BNB_INLINE float encode_block(const T* a, int64_t n, int32_t largest, float inverse, const Encode& encode,
                              const Output& output) {
  if (largest < kSmallestNormal || largest >= kInfinity) {
    output.fill(encode.zero, n);
    return largest < kSmallestNormal ? 0.0f : float_from_bits(largest > kInfinity ? kNan : kInfinity);
  }
  encode_values(a, n, splat(inverse), encode, output);
  return float_from_bits(largest);
}

template <class T, class Encode, class Output>
BNB_INLINE float quantize_block(const T* a, int64_t n, const Encode& encode, const Output& output) {
  const int32_t largest = absmax_bits(a, n);
  return encode_block(a, n, largest, 1.0f / float_from_bits(largest), encode, output);
}

// Quantizes A by the encoder with which with_encoder(f) calls f; output_at(i, encode) takes the codes of the
// block that begins with element i. The absmax of some blocks are found before the first is encoded, so that
// none waits for its own.
template <class WithEncoder, class OutputAt>
void quantize_blocks(const Matrix& A, int64_t blocksize, const WithEncoder& with_encoder,
                     const OutputAt& output_at, float* absmax) {
  constexpr int64_t kAtATime = 8;
  const int64_t n = A.count();
  with_type(A, [&](const auto* a) {
    parallel_for(ceil_div(n, blocksize), grain(blocksize), [&](int64_t begin, int64_t end) {
      with_encoder([&](const auto encode) {
        const auto length = [=](int64_t b) { return min(blocksize, n - b * blocksize); };
        for (int64_t first = begin; first < end; first += kAtATime) {
          const int64_t last = min(first + kAtATime, end);
          int32_t largest[kAtATime];
          float inverse[kAtATime];
          for (int64_t b = first; b < last; b++)
            largest[b - first] = absmax_bits(a + b * blocksize, length(b));
          for (int64_t i = 0; i < last - first; i++) inverse[i] = 1.0f / float_from_bits(largest[i]);
          for (int64_t b = first; b < last; b++) {
            const int64_t i = b - first, element = b * blocksize;
            absmax[b] = encode_block(a + element, length(b), largest[i], inverse[i], encode,
                                     output_at(element, encode));
          }
        }
      });
    });
  });
}

template <class Encoding>
void quantize_blockwise(const Matrix& A, const float* code, int64_t blocksize, uint8_t* q, float* absmax,
                        Stream) {
  const Encoding encoding(code, A.count());
  advise_huge_pages(q, A.count());
  quantize_blocks(
      A, blocksize, [&](const auto& f) { encoding.with_encoder(f); },
      [=](int64_t first, const auto&) { return Bytes{q + first}; }, absmax);
}

template <class Encoding>
void quantize_4bit(const Matrix& A, int64_t blocksize, QuantType quant_type, uint8_t* packed, float* absmax,
                   Stream) {
  advise_huge_pages(packed, A.count() / 2);
  quantize_blocks(
      A, blocksize, [=](const auto& f) { Encoding::with_encoder(format_of(quant_type), f); },
      [=](int64_t first, const auto& encode) { return Nibbles{packed + first / 2, encode.zero}; }, absmax);
}

template <class T>
void dequantize_block(const uint8_t* q, float absmax, const ByteTable& code, int64_t n, T* out) {
  const F32 scale = splat(absmax);
  code.for_each(q, n, [&](int64_t i, auto lanes, F32 values) { store(out + i, values * scale, lanes); });
}

void dequantize_blockwise(const uint8_t* q, const float* absmax, const float* code, int64_t blocksize,
                          const Matrix& out, Stream) {
  const int64_t n = out.count();
  with_type(out, [&](auto* y) {
    advise_huge_pages(y, n * sizeof *y);
    parallel_for(ceil_div(n, blocksize), grain(blocksize, kDecodedShare), [&](int64_t begin, int64_t end) {
      const ByteTable table(code);
      for (int64_t b = begin; b < end; b++) {
        const int64_t first = b * blocksize;
        dequantize_block(q + first, absmax[b], table, min(blocksize, n - first), y + first);
      }
    });
  });
}

class BlockDecoder4bit {
 public:
  explicit BlockDecoder4bit(const float* codebook) : codebook_(codebook), table_(codebook) {}

  // `packed` starts at the block's first element.
  template <class T>
  void decode(const uint8_t* packed, float absmax, int64_t n, T* out) const {
    using Span = NibbleTable::Span;
    constexpr int kSpan = Span::kVectors * kLanes;
    const F32 scale = splat(absmax);
    int64_t i = 0;
    if constexpr (kHasHalfTable && sizeof(T) == sizeof(uint16_t)) {
      const HalfTable<T> halves(codebook_, scale);
      constexpr int kElements = HalfTable<T>::kElements;
      for (; i + kElements <= n; i += kElements) halves.look_up(packed + i / 2, out + i);
    }
    for (; i + kSpan <= n; i += kSpan) {
      const Span span = table_.span(packed + i / 2);
      for (int v = 0; v < Span::kVectors; v++) store(out + i + v * kLanes, span.values[v] * scale);
    }
    if (i == n) return;
    uint8_t tail[kSpan / 2] = {};
    __builtin_memcpy(tail, packed + i / 2, (n - i + 1) / 2);
    const Span span = table_.span(tail);
    for_each_vector(
        n - i, [&](int64_t k, auto lanes) { store(out + i + k, span.values[k / kLanes] * scale, lanes); });
  }

 private:
  const float* const codebook_;
  const NibbleTable table_;
};

void dequantize_4bit(const Weight4bit& weight, const Matrix& out, Stream) {
  constexpr int64_t kScales = 256;  // decoded at a time
  const StoredScales stored = stored_scales(weight);
  const int64_t n = weight.count(), blocksize = weight.blocksize;
  with_type(out, [&](auto* y) {
    advise_huge_pages(y, n * sizeof *y);
    parallel_for(stored.blocks, grain(blocksize, kDecodedShare), [&](int64_t begin, int64_t end) {
      const BlockDecoder4bit decoder(weight.format().codebook);
      float buffer[kScales + kLanes];
      for (int64_t b = begin; b < end;) {
        const int64_t count = min(end - b, kScales);
        const float* const absmax = stored.read(b, count, buffer);
        for (int64_t i = 0; i < count; i++, b++) {
          const int64_t first = b * blocksize;
          decoder.decode(weight.packed + first / 2, absmax[i], min(blocksize, n - first), y + first);
        }
      }
    });
  });
}

}  // namespace
}  // namespace bnb::BNB_TARGET
