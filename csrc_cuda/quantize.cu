// Blockwise quantization to 256-entry and 4-bit codebooks, and back (docs/SPEC.md section 2).
#include <type_traits>

#include "block_scales.h"
#include "encode.h"
#include "grid.h"
#include "operations.h"

namespace bnb {
namespace {

constexpr int kThreads = CellEncoder::kThreads;

// How a tile of elements is spread over a block of threads. It is a whole number of quantization blocks,
// whatever their size. A thread holds neighbours, in kChunks places, so that memory is read once.
template <class T>
struct Tile {
  static constexpr int kItems = 2 * kAccessBytes / sizeof(T);
  static constexpr int kChunks = 16 / kItems;
  static constexpr int kSize = kThreads * kItems * kChunks;
  static constexpr int kSpan = kWarp * kItems;  // of a chunk in a warp
  static constexpr int kSpans = kSize / kSpan;
  static_assert(kSize % 4096 == 0, "the largest quantization block");

  // Where this thread's elements of a chunk begin, and the span that they are in.
  static __device__ int offset_of(int chunk) {
    return (chunk * kThreads + static_cast<int>(threadIdx.x)) * kItems;
  }
  static __device__ int span_of(int chunk) { return chunk * (kThreads / kWarp) + warp(); }

  // Makes of each thread's largest magnitudes those of the quantization blocks that its chunks are in.
  static __device__ void reduce_to_blocks(int blocksize, int32_t (&largest)[kChunks], int32_t* spans) {
    const int lanes = min(blocksize / kItems, kWarp);
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int c = 0; c < kChunks; c++) largest[c] = max(largest[c], shuffle_xor(largest[c], distance));
    }
    if (blocksize <= kSpan) return;
    __syncthreads();  // the last tile's have been read
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
      if (lane() == 0) spans[span_of(c)] = largest[c];
    }
    __syncthreads();
    const int count = blocksize / kSpan;
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
      const int first = span_of(c) & ~(count - 1);
      for (int s = 0; s < count; s++) largest[c] = max(largest[c], spans[first + s]);
    }
  }
};

template <class AnyEncoder, class T>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const T* a, int64_t n, int block_shift, typename AnyEncoder::Source source, uint8_t* out,
                    float* absmax) {
  using Tile = Tile<T>;
  constexpr int chunks = Tile::kChunks, items = Tile::kItems, each = 8 / AnyEncoder::kBits;
  __shared__ typename AnyEncoder::Tables tables;
  __shared__ int32_t spans[Tile::kSpans];
  AnyEncoder::prepare(tables, source);
  __syncthreads();
  const int blocksize = 1 << block_shift;
  const auto quantize_tile = [&](int64_t first, auto is_whole) {
    constexpr bool whole = decltype(is_whole)::value;
    float x[chunks][items];
    int32_t largest[chunks] = {};
#pragma unroll
    for (int c = 0; c < chunks; c++) {
      const int64_t begin = first + Tile::offset_of(c);
      load_floats(a + begin, whole, n - begin, x[c]);
    }
#pragma unroll
    for (int c = 0; c < chunks; c++) {
#pragma unroll
      for (int i = 0; i < items; i++) largest[c] = max(largest[c], magnitude_bits(x[c][i]));
    }
    Tile::reduce_to_blocks(blocksize, largest, spans);
#pragma unroll
    for (int c = 0; c < chunks; c++) {
      const int64_t begin = first + Tile::offset_of(c);
      uint32_t codes[items / each / 4];
      encode_block<AnyEncoder>(tables, largest[c], x[c], codes);
      store_bytes(out + begin / each, whole, (n - begin + each - 1) / each, codes);
      if ((whole || begin < n) && (begin & (blocksize - 1)) == 0) {
        absmax[begin >> block_shift] = stored_absmax(largest[c]);
      }
    }
  };
  const int64_t stride = int64_t{gridDim.x} * Tile::kSize;
  int64_t first = int64_t{blockIdx.x} * Tile::kSize;
  if (are_aligned<items>(a) && are_aligned<items / each>(out)) {
    for (; n - first >= Tile::kSize; first += stride) quantize_tile(first, std::true_type());
  }
  for (; first < n; first += stride) quantize_tile(first, std::false_type());
}

// A thread makes several times 16 bytes of output, all their codes loaded first.
template <class T>
constexpr int kOutputs = kAccessBytes / sizeof(T);
constexpr int kUnrolled = 4;

struct LongCodebook {
  static constexpr int kBits = 8;
  const float* values;
  __device__ float operator[](int i) const { return values[i]; }
};
struct ShortCodebook {
  static constexpr int kBits = 4;
  float values[16];
  __device__ float operator[](int i) const { return values[i]; }
};

template <class Codebook, class Scales, class T>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* codes, Scales stored, Codebook codebook, int64_t n, int block_shift,
                      T* out) {
  constexpr int bits = Codebook::kBits;
  constexpr int items = kOutputs<T>;
  constexpr int bytes = items * bits / 8;
  constexpr int64_t tile = kThreads * items * kUnrolled;
  __shared__ float values[1 << bits];
  if (threadIdx.x < 1 << bits) values[threadIdx.x] = codebook[static_cast<int>(threadIdx.x)];
  __syncthreads();
  const float offset = stored.offset();
  const auto dequantize_tile = [&](int64_t first, auto is_whole) {
    constexpr bool whole = decltype(is_whole)::value;
    uint8_t packed[kUnrolled][bytes];
    decltype(stored.load(0)) scales[kUnrolled];
#pragma unroll
    for (int u = 0; u < kUnrolled; u++) {
      const int64_t begin = first + (u * kThreads + static_cast<int>(threadIdx.x)) * items;
      const int64_t valid = n - begin;
      load(codes + begin * bits / 8, whole, (valid * bits + 7) / 8, packed[u]);
      scales[u] = whole || valid > 0 ? stored.load(begin >> block_shift) : decltype(stored.load(0)){};
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; u++) {
      const int64_t begin = first + (u * kThreads + static_cast<int>(threadIdx.x)) * items;
      const float scale = stored.decode(scales[u], offset);
      float y[items];
#pragma unroll
      for (int i = 0; i < items; i++) {
        const int code = bits == 8 ? packed[u][i] : packed[u][i / 2] >> (i % 2 ? 0 : 4) & 15;
        y[i] = values[code] * scale;
      }
      store_floats(out + begin, whole, n - begin, y);
    }
  };
  const int64_t stride = gridDim.x * tile;
  int64_t first = blockIdx.x * tile;
  if (are_aligned<bytes>(codes) && are_aligned<items>(out)) {
    for (; n - first >= tile; first += stride) dequantize_tile(first, std::true_type());
  }
  for (; first < n; first += stride) dequantize_tile(first, std::false_type());
}

template <class AnyEncoder>
void quantize(const char* name, const Matrix& A, const typename AnyEncoder::Source& source, int64_t blocksize,
              uint8_t* out, float* absmax, Stream stream) {
  if (A.count() == 0) return;
  with_dtype(A.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t tiles = ceil_div(A.count(), Tile<T>::kSize);
    launch(name, quantize_kernel<AnyEncoder, T>, resident_grid(tiles, kThreads), kThreads, stream, 0,
           A.as<const T>(), A.count(), log2_of(blocksize), source, out, absmax);
  });
}

template <class Scales, class Codebook>
void dequantize(const char* name, const uint8_t* codes, const Scales& scales, const Codebook& codebook,
                int64_t blocksize, const Matrix& out, Stream stream) {
  if (out.count() == 0) return;
  with_dtype(out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t tiles = ceil_div(out.count(), kThreads * kOutputs<T> * kUnrolled);
    launch(name, dequantize_kernel<Codebook, Scales, T>, resident_grid(tiles, kThreads), kThreads, stream, 0,
           codes, scales, codebook, out.count(), log2_of(blocksize), out.as<T>());
  });
}

}  // namespace

void gpu::quantize_blockwise(const Matrix& A, const float* code, int64_t blocksize, uint8_t* q, float* absmax,
                             Stream stream) {
  quantize<CellEncoder>("quantize_blockwise", A, code, blocksize, q, absmax, stream);
}

void gpu::dequantize_blockwise(const uint8_t* q, const float* absmax, const float* code, int64_t blocksize,
                               const Matrix& out, Stream stream) {
  dequantize("dequantize_blockwise", q, F32Scales{absmax}, LongCodebook{code}, blocksize, out, stream);
}

void gpu::quantize_4bit(const Matrix& A, int64_t blocksize, QuantType quant_type, uint8_t* packed,
                        float* absmax, Stream stream) {
  const Format4bit& format = format_of(quant_type);
  const auto run = [&](auto encoder) {
    using ShortEncoder = decltype(encoder);
    quantize<ShortEncoder>("quantize_4bit", A, ShortEncoder::source(format), blocksize, packed, absmax,
                           stream);
  };
  switch (format.encoder) {
    case Encoder::nearest:
      return run(ShortEncoder<Encoder::nearest>());
    case Encoder::sign_magnitude:
      return run(ShortEncoder<Encoder::sign_magnitude>());
  }
}

void gpu::dequantize_4bit(const Weight4bit& weight, const Matrix& out, Stream stream) {
  ShortCodebook codebook;
  for (int code = 0; code < 16; code++) codebook.values[code] = weight.format().codebook[code];
  const auto run = [&](const auto& scales) {
    dequantize("dequantize_4bit", weight.packed, scales, codebook, weight.blocksize, out, stream);
  };
  if (weight.scales.codes) return run(StoredScales(weight.scales));
  run(F32Scales{weight.scales.absmax});
}

}  // namespace bnb
