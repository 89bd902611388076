// A @ dequantized(W)^T + bias from W as the checkpoint stores it (docs/SPEC.md section 3).
//
// A 32-bit word of the packed weight holds 8 consecutive elements of a row. A vector of words holds a group
// of 8 * kLanes elements, and shifting it right by 4 * i brings nibble i of every word to the bottom, ready
// for the codebook lookup: no nibble crosses a lane. Only A is rearranged to that order.
//
// A row need not start on a word. Its words are then read from the boundary before it, and A is rearranged
// with as many zeros in front. Rows whose start leaves the same remainder (a phase) share that copy of A.
#pragma once

#include "quantize.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int kWord = 8;                // elements in a 32-bit word
constexpr int kGroup = kWord * kLanes;  // elements in a vector of words
constexpr int kChunk = 4096;            // elements of a row whose scales are read at a time
constexpr int kChunkGroups = kChunk / kGroup;
constexpr int kTile = 1024;  // elements of a row that are decoded to L1 at a time
constexpr int kTileGroups = kTile / kGroup;
constexpr int kSmallestBlock = 32;
constexpr int kMaxScales =
    kChunk / kSmallestBlock + 1 + kLanes;  // of a chunk, and what a vector reads beyond
constexpr int kBlockRows = 64;             // rows of A that stay in L2
constexpr int kTileRows = 4;               // accumulators: kTileRows * kTileColumns, in registers
constexpr int kTileColumns = kRegisters == 32 ? 6 : 3;
constexpr int kGemvRows = 4;  // up to here, products are taken straight from the codes

struct Weight {
  int64_t N, K;
  const uint8_t* packed;
  BlockScales scales;
  int64_t blocksize;
  const float* code;

  int64_t bytes() const { return (N * K + 1) / 2; }

  void read_scales(int64_t block, int64_t count, float* out) const {
    if (scales.absmax) {
      __builtin_memcpy(out, scales.absmax + block, count * sizeof(float));
      return;
    }
    const Table<256> nested_code(scales.nested_code);
    const F32 offset = splat(*scales.offset);
    for (const int64_t end = block + count; block < end;) {
      const int64_t nested_block = block / scales.nested_blocksize;
      const int64_t length = min(end, (nested_block + 1) * scales.nested_blocksize) - block;
      const F32 nested_absmax = splat(scales.nested_absmax[nested_block]);
      for_each_vector(length, [&](int64_t i, auto lanes) {
        const I32 code = load(scales.codes + block + i, lanes);
        store(out + i, nested_code[code] * nested_absmax + offset, lanes);
      });
      block += length;
      out += length;
    }
  }
};

// A rearranged: vector i of group g holds elements kWord * lane + (i ^ 1) of the group, as the high nibble of
// a byte comes first. `phase` zeros stand in front, and zeros fill the last group.
template <class T>
void rearrange_row(const T* a, int64_t K, int64_t phase, int64_t groups, float* out) {
  float group[kGroup];
  for (int64_t g = 0; g < groups; g++, out += kGroup) {
    const int64_t first = max(g * kGroup - phase, 0);
    const int64_t end = min((g + 1) * kGroup - phase, K);
    const int64_t zeros = g == 0 ? phase : 0;
    if (end - first < kGroup) __builtin_memset(group, 0, sizeof group);
    for_each_vector(end - first, [&](int64_t i, auto lanes) {
      store(group + zeros + i, load(a + first + i, lanes), lanes);
    });
    for (int i = 0; i < kWord; i++) {
      for (int lane = 0; lane < kLanes; lane++) out[i * kLanes + lane] = group[kWord * lane + (i ^ 1)];
    }
  }
}

// The words of one row of W, and the scale of each, a part of the row at a time.
class RowReader {
 public:
  void start(const Weight& w, int64_t row) {
    w_ = &w;
    start_ = row * w.K / kWord * kWord;
    end_ = (row + 1) * w.K;
    shift_ = __builtin_ctzll(w.blocksize / kWord);
  }

  // Turns to groups [group, group + groups), at most a chunk of them.
  void open(int64_t group, int groups) {
    const int64_t first = start_ + group * kGroup;
    const int64_t first_block = first / w_->blocksize;
    const int64_t blocks = ceil_div(min(first + groups * kGroup, end_), w_->blocksize) - first_block;
    w_->read_scales(first_block, blocks, scales_);
    __builtin_memset(scales_ + blocks, 0, kLanes * sizeof(float));
    words_in_block_ = static_cast<int>(first % w_->blocksize / kWord);
    bytes_ = w_->packed + first / 2;
    bytes_left_ = w_->bytes() - first / 2;
  }

  BNB_INLINE I32 words(int group) const {
    const int64_t offset = group * (kGroup / 2);
    if (offset + kGroup / 2 <= bytes_left_) return load_words(bytes_ + offset);
    uint8_t tail[kGroup / 2] = {};
    __builtin_memcpy(tail, bytes_ + offset, bytes_left_ - offset);
    return load_words(tail);
  }

  BNB_INLINE F32 scales(int group) const {
    const int word = words_in_block_ + group * kLanes;
    const int first = word >> shift_;
    I32 lane;
    for (int i = 0; i < kLanes; i++) lane[i] = i;
    return Table<kLanes>(scales_ + first)[(splat(word - (first << shift_)) + lane) >> shift_];
  }

 private:
  const Weight* w_;
  int64_t start_, end_;
  int shift_;  // of an index of words to one of blocks
  int words_in_block_;
  const uint8_t* bytes_;
  int64_t bytes_left_;
  float scales_[kMaxScales];
};

// The rows of W that one phase computes with, and where the products go.
struct Product {
  const Weight& w;
  int64_t phase, phases;  // rows phase, phase + phases, ... of W
  const float* a;         // rearranged, f32[rows, groups * kGroup]
  int64_t rows, groups;
  float* y;  // f32[rows, N]

  int64_t row_length() const { return groups * kGroup; }
  int64_t weight_rows() const { return ceil_div(w.N - phase, phases); }
  int64_t weight_row(int64_t i) const { return phase + i * phases; }

  // Rows [first, first + columns) of this phase; beyond `end` the last one again.
  template <int columns>
  void start(RowReader (&readers)[columns], int64_t first, int64_t end) const {
    for (int c = 0; c < columns; c++) readers[c].start(w, weight_row(min(first + c, end - 1)));
  }
  template <int columns>
  void write(const F32 (&sums)[columns], int64_t row, int64_t first, int64_t end) const {
    for (int c = 0; c < min(columns, end - first); c++) {
      y[row * w.N + weight_row(first + c)] = reduce_add(sums[c]);
    }
  }
};

// A few rows of A: codes are looked up, multiplied and summed in registers, and a block's scale is applied to
// its partial sums.
template <int rows, int columns>
void gemv(const Product& product, int64_t begin, int64_t end) {
  const Table<16> code(product.w.code);
  RowReader readers[columns];
  for (int64_t first = begin; first < end; first += columns) {
    product.start(readers, first, end);
    F32 sums[rows][columns] = {};
    for (int64_t group = 0; group < product.groups; group += kChunkGroups) {
      const int groups = static_cast<int>(min(kChunkGroups, product.groups - group));
      for (RowReader& reader : readers) reader.open(group, groups);
      const float* a = product.a + group * kGroup;
      for (int g = 0; g < groups; g++, a += kGroup) {
        I32 words[columns];
        F32 partial[rows][columns] = {};
        for (int c = 0; c < columns; c++) words[c] = readers[c].words(g);
        for (int i = 0; i < kWord; i++) {
          for (int c = 0; c < columns; c++) {
            const F32 value = code[words[c] >> (4 * i)];
            for (int r = 0; r < rows; r++) {
              partial[r][c] = fma(value, load(a + r * product.row_length() + i * kLanes), partial[r][c]);
            }
          }
        }
        for (int c = 0; c < columns; c++) {
          const F32 scale = readers[c].scales(g);
          for (int r = 0; r < rows; r++) sums[r][c] = fma(partial[r][c], scale, sums[r][c]);
        }
      }
    }
    for (int r = 0; r < rows; r++) product.write(sums[r], r, first, end);
  }
}

// Adds the products of `rows` rows of A with a decoded tile of W.
template <int rows>
void multiply_tile(const float* a, int64_t row_length, const float (*tile)[kTile], int vectors,
                   F32 (*sums)[kTileColumns]) {
  F32 partial[rows][kTileColumns] = {};
  for (int v = 0; v < vectors; v++) {
    F32 values[kTileColumns];
    for (int c = 0; c < kTileColumns; c++) values[c] = load(tile[c] + v * kLanes);
    for (int r = 0; r < rows; r++) {
      const F32 x = load(a + r * row_length + v * kLanes);
      for (int c = 0; c < kTileColumns; c++) partial[r][c] = fma(x, values[c], partial[r][c]);
    }
  }
  for (int r = 0; r < rows; r++) {
    for (int c = 0; c < kTileColumns; c++) sums[r][c] += partial[r][c];
  }
}

// Many rows of A: a tile of W is decoded once into L1 and multiplied with all of them.
void gemm(const Product& product, int64_t begin, int64_t end) {
  const Table<16> code(product.w.code);
  RowReader readers[kTileColumns];
  alignas(64) float tile[kTileColumns][kTile];
  for (int64_t first = begin; first < end; first += kTileColumns) {
    product.start(readers, first, end);
    F32 sums[kBlockRows][kTileColumns] = {};
    for (int64_t group = 0; group < product.groups; group += kTileGroups) {
      const int groups = static_cast<int>(min(kTileGroups, product.groups - group));
      for (int c = 0; c < kTileColumns; c++) {
        readers[c].open(group, groups);
        for (int g = 0; g < groups; g++) {
          const I32 words = readers[c].words(g);
          const F32 scale = readers[c].scales(g);
          for (int i = 0; i < kWord; i++) {
            store(tile[c] + g * kGroup + i * kLanes, code[words >> (4 * i)] * scale);
          }
        }
      }
      const float* a = product.a + group * kGroup;
      const int64_t length = product.row_length();
      int64_t r = 0;
      for (; r + kTileRows <= product.rows; r += kTileRows) {
        multiply_tile<kTileRows>(a + r * length, length, tile, groups * kWord, sums + r);
      }
      for (; r < product.rows; r++) {
        multiply_tile<1>(a + r * length, length, tile, groups * kWord, sums + r);
      }
    }
    for (int64_t r = 0; r < product.rows; r++) product.write(sums[r], r, first, end);
  }
}

void multiply(const Product& product, int64_t begin, int64_t end) {
  constexpr int wide = kRegisters / 8;
  switch (product.rows) {
    case 1:
      return gemv<1, wide>(product, begin, end);
    case 2:
      return gemv<2, wide>(product, begin, end);
    case 3:
      return gemv<3, wide / 2>(product, begin, end);
    case 4:
      return gemv<4, wide / 2>(product, begin, end);
  }
  gemm(product, begin, end);
}

// y f32[rows, N] = a @ W^T for up to kBlockRows rows.
template <class T>
void multiply_block(const T* a, int64_t rows, const Weight& w, float* y) {
  int64_t phases = 1;
  while (phases * w.K % kWord != 0) phases *= 2;
  const int64_t max_groups = ceil_div(w.K + kWord - 1, kGroup);
  const Buffer<float> rearranged(rows * max_groups * kGroup);
  for (int64_t phase = 0; phase < min(phases, w.N); phase++) {
    const int64_t zeros = phase * w.K % kWord;
    const int64_t groups = ceil_div(zeros + w.K, kGroup);
    parallel_for(rows, grain(w.K), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        rearrange_row(a + r * w.K, w.K, zeros, groups, rearranged.data() + r * groups * kGroup);
      }
    });
    const Product product{w, phase, phases, rearranged.data(), rows, groups, y};
    parallel_for(product.weight_rows(), grain(w.K / 2),
                 [&](int64_t begin, int64_t end) { multiply(product, begin, end); });
  }
}

// out = y + bias, rounded once.
template <class T>
void finish_block(const float* y, int64_t rows, int64_t N, const T* bias, T* out) {
  parallel_for(rows, grain(N), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      for_each_vector(N, [&](int64_t n, auto lanes) {
        const F32 sum = load(y + r * N + n, lanes);
        store(out + r * N + n, bias ? sum + load(bias + n, lanes) : sum, lanes);
      });
    }
  });
}

template <class T>
void gemm_4bit_typed(const T* a, int64_t M, const Weight& w, const T* bias, T* out) {
  const Buffer<float> y(min(M, kBlockRows) * w.N);
  for (int64_t row = 0; row < M; row += kBlockRows) {
    const int64_t rows = min(M - row, kBlockRows);
    multiply_block(a + row * w.K, rows, w, y.data());
    finish_block(y.data(), rows, w.N, bias, out + row * w.N);
  }
}

void gemm_4bit(const void* A, DType dtype, int64_t M, int64_t N, int64_t K, const uint8_t* packed,
               const BlockScales& scales, int64_t blocksize, QuantType quant_type, const void* bias,
               void* out, Stream) {
  const Weight w{N, K, packed, scales, blocksize, codebook(quant_type)};
  with_type(dtype, out, [&](auto* y) {
    const auto typed = [&](const void* p) { return same_type(p, y); };
    gemm_4bit_typed(typed(A), M, w, typed(bias), y);
  });
}

}  // namespace
}  // namespace bnb::BNB_TARGET
