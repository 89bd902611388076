// A few rows times a 4-bit weight: products are taken straight from the codes, at the speed of memory.
//
// A 32-bit word of the packed weight holds 8 consecutive elements of a row. A vector of words holds a group
// of 8 * kLanes elements, and shifting it right by 4 * i brings nibble i of every word to the bottom, ready
// for the codebook lookup: no nibble crosses a lane. Only A is rearranged to that order.
//
// A row need not start on a word. Its words are then read from the boundary before it, and A is rearranged
// with as many zeros in front. Rows whose start leaves the same remainder (a phase) share that copy of A.
#pragma once

#include "weight_4bit.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int kWordBytes = kWord / 2;
constexpr int kGroup = kWord * kLanes;  // elements in a vector of words
constexpr int kChunk = 4096;            // elements of a row whose scales are read at a time
constexpr int kChunkGroups = kChunk / kGroup;
constexpr int kCachedBytes = 24 << 10;  // of A's rows, for a block of rows of W: most of a first-level cache
constexpr int kSmallestBlock = 32;
constexpr int kMaxScales =
    kChunk / kSmallestBlock + 1 + kLanes;  // of a chunk, and what a vector reads beyond

// How the elements of A and the values of codes are multiplied: a nibble of every word in f32. An instruction
// set may have a better way for some dtype of A.
class FloatProducts {
 public:
  typedef float Element;  // of A rearranged
  typedef F32 Vector;
  typedef BNB_TARGET::Words Words;        // how a group's codes are read
  static constexpr int kVectors = kWord;  // in a group
  static constexpr int kMostRows = 4;     // of A, at a time
  static constexpr int columns(int rows) { return rows <= 2 ? kStreams : kStreams / 2; }
  static constexpr int chains(int) { return 1; }  // of sums, for a row and a column
  static constexpr int block(int) { return 1; }   // rows of W that take turns with a part of A

  explicit FloatProducts(const float* code) : code_(code) {}
  BNB_INLINE auto decode(const Words& words) const { return code_(words); }
  static BNB_INLINE F32 load(const float* x) { return BNB_TARGET::load(x); }
  static BNB_INLINE F32 multiply_add(F32 values, F32 x, F32 sums) { return fma(values, x, sums); }

  template <class T>
  static void read(const T* a, int64_t n, float* group) {
    for_each_vector(n,
                    [&](int64_t i, auto lanes) { store(group + i, BNB_TARGET::load(a + i, lanes), lanes); });
  }
  // Vector i takes elements kWord * lane + (i ^ 1) of the group, as the high nibble of a byte comes first.
  static void reorder(const float* group, float* out) {
    for (int i = 0; i < kWord; i++) {
      for (int lane = 0; lane < kLanes; lane++) out[i * kLanes + lane] = group[kWord * lane + (i ^ 1)];
    }
  }

 private:
  const NibbleTable code_;
};

// A row of A rearranged: its groups are `stride` elements apart. `phase` zeros stand in front, and zeros fill
// the last group.
template <class Products, class T>
void rearrange_row(const T* a, int64_t K, int64_t phase, int64_t groups, int64_t stride,
                   typename Products::Element* out) {
  typename Products::Element group[kGroup];
  for (int64_t g = 0; g < groups; g++, out += stride) {
    const int64_t first = max(g * kGroup - phase, 0);
    const int64_t end = min((g + 1) * kGroup - phase, K);
    const int64_t zeros = g == 0 ? phase : 0;
    if (end - first < kGroup) __builtin_memset(group, 0, sizeof group);
    Products::read(a + first, end - first, group + zeros);
    Products::reorder(group, out);
  }
}

// out[M, N] = a[M, K] @ w^T + bias.
template <class T>
struct Gemm4bit {
  const T* a;
  int64_t M;
  const Weight4bit& w;
  const float* code;  // f32[16]: what w's codes stand for
  Result<T> result;
};

// The words of one row of W, and the scale of each, a part of the row at a time.
class RowReader {
 public:
  // `ahead`: how many bytes beyond a group memory is asked for meanwhile.
  void start(const Weight4bit& w, const StoredScales& stored, int64_t row, int64_t ahead) {
    w_ = &w;
    ahead_ = ahead;
    stored_ = &stored;
    start_ = row * w.K / kWord * kWord;
    end_ = (row + 1) * w.K;
    shift_ = w.block_shift() - kWordShift;
  }

  // Turns to groups [group, group + groups), at most a chunk of them.
  void open(int64_t group, int groups) {
    const int64_t first = start_ + group * kGroup;
    const int64_t first_block = first >> w_->block_shift();
    const int64_t end_block = ((min(first + groups * kGroup, end_) - 1) >> w_->block_shift()) + 1;
    const int64_t blocks = end_block - first_block;
    scales_ = stored_->read(first_block, blocks, buffer_);
    for (int64_t i = 0; i < blocks; i += kLanes) __builtin_prefetch(scales_ + blocks + i);
    if (first + groups * kGroup > end_) scales_ = ending_with_zeros(scales_, blocks);
    words_in_block_ = static_cast<int>(first & (w_->blocksize - 1)) / kWord;
    bytes_ = w_->packed + first / 2;
    bytes_left_ = w_->bytes() - first / 2;
  }

  // Whether a chunk can be read without regard to the end of W, and its lanes lie in blocks alike in every
  // group, and as those of `other`.
  bool steady(int groups, const RowReader& other) const {
    const bool aligned = kLanes >> shift_ != 0 || words_in_block_ % kLanes == 0;
    return aligned && words_in_block_ == other.words_in_block_ &&
           bytes_left_ >= groups * kGroupBytes + kWordBytes;
  }

  // The words of a group.
  template <class Words>
  BNB_INLINE Words steady_words(int group) const {
    const uint8_t* p = bytes_ + group * kGroupBytes;
    __builtin_prefetch(p + ahead_);
    return Words(p);
  }
  template <class Words>
  BNB_INLINE Words words(int group) const {
    const int64_t offset = group * kGroupBytes;
    if (offset + kGroupBytes + kWordBytes <= bytes_left_) return steady_words<Words>(group);
    uint8_t tail[kGroupBytes + kWordBytes] = {};
    __builtin_memcpy(tail, bytes_ + offset, min(bytes_left_ - offset, kGroupBytes));
    return Words(tail);
  }

  // The scale of each word of a group: `block` from the chunk's first on, and for each lane how much further.
  BNB_INLINE int block(int group) const { return (words_in_block_ + group * kLanes) >> shift_; }
  BNB_INLINE I32 block_of_lane(int group) const {
    I32 word;
    for (int i = 0; i < kLanes; i++) word[i] = i;
    const int first = (words_in_block_ + group * kLanes) & ((1 << shift_) - 1);
    return (splat(first) + word) >> shift_;
  }
  BNB_INLINE F32 scales(int block, I32 block_of_lane) const {
    return Table<kLanes>(scales_ + block)[block_of_lane];
  }
  F32 scales(int group) const { return scales(block(group), block_of_lane(group)); }

 private:
  static constexpr int64_t kGroupBytes = kGroup / 2;

  // Of the last words the row has no element. Zeros of A stand for those, and the next row's scale, which may
  // not be finite, must not be multiplied by them.
  const float* ending_with_zeros(const float* scales, int64_t blocks) {
    if (scales != buffer_) __builtin_memcpy(buffer_, scales, blocks * sizeof(float));
    __builtin_memset(buffer_ + blocks, 0, kLanes * sizeof(float));
    return buffer_;
  }

  const Weight4bit* w_;
  const StoredScales* stored_;
  int64_t start_, end_, ahead_;
  int shift_;  // of an index of words to one of blocks
  int words_in_block_;
  const uint8_t* bytes_;
  int64_t bytes_left_;
  const float* scales_;
  float buffer_[kMaxScales];
};

// The rows of W that one phase computes with, and where the products go.
template <class Element>
struct Product {
  const Weight4bit& w;
  const StoredScales stored;
  const float* code;
  int64_t phase, phases;  // rows phase, phase + phases, ... of W
  const Element* a;       // rearranged, [groups, rows, kGroup]
  int64_t rows, groups;
  float* y;  // f32[rows, N]

  int64_t weight_rows() const { return ceil_div(w.N - phase, phases); }
  int64_t weight_row(int64_t i) const { return phase + i * phases; }
  int64_t row_bytes() const { return phases * w.K / 2; }
};

// Adds the products of a chunk of some rows of W with a few rows of A. What it sums in is local, and stays in
// registers as does a group of A, because nothing else is written meanwhile.
template <bool steady, class Products, int rows, int columns>
void add_chunk(const Products products, const RowReader (&readers)[columns], int groups,
               const typename Products::Element* a, F32 (&result)[rows][columns]) {
  using Vector = typename Products::Vector;
  using Words = typename Products::Words;
  constexpr int kVectors = Products::kVectors, kElements = kGroup / kVectors;
  constexpr int kChains = Products::chains(rows);
  F32 sums[rows][columns] = {};
  const I32 steady_lanes = readers[0].block_of_lane(0);
  for (int g = 0; g < groups; g++, a += rows * kGroup) {
    const int block = readers[0].block(g);
    const auto words_of = [&](int c) {
      return steady ? readers[c].template steady_words<Words>(g) : readers[c].template words<Words>(g);
    };
    const auto scales_of = [&](int c) {
      return steady ? readers[c].scales(block, steady_lanes) : readers[c].scales(g);
    };
    if constexpr (columns > 1 && columns * kVectors <= kRegisters / 2) {
      static_assert(kChains == 1, "several columns are chains enough");
      Vector values[columns][kVectors];
      F32 scales[columns];
      BNB_UNROLL for (int c = 0; c < columns; c++) {
        const auto words = words_of(c);
        const auto decoded = products.decode(words);
        for (int i = 0; i < kVectors; i++) values[c][i] = decoded[i];
        scales[c] = scales_of(c);
      }
      BNB_UNROLL for (int r = 0; r < rows; r++) {
        F32 partial[columns] = {};
        for (int i = 0; i < kVectors; i++) {
          const Vector x = Products::load(a + r * kGroup + i * kElements);
          BNB_UNROLL for (int c = 0; c < columns; c++) partial[c] =
              Products::multiply_add(values[c][i], x, partial[c]);
        }
        BNB_UNROLL for (int c = 0; c < columns; c++) sums[r][c] = fma(partial[c], scales[c], sums[r][c]);
      }
    } else {
      Vector x[rows][kVectors];
      BNB_UNROLL for (int r = 0; r < rows; r++) {
        for (int i = 0; i < kVectors; i++) x[r][i] = Products::load(a + r * kGroup + i * kElements);
      }
      BNB_UNROLL for (int c = 0; c < columns; c++) {
        const auto words = words_of(c);
        const auto decoded = products.decode(words);
        F32 partial[rows][kChains] = {};
        for (int i = 0; i < kVectors; i++) {
          const Vector value = decoded[i];
          BNB_UNROLL for (int r = 0; r < rows; r++) partial[r][i % kChains] =
              Products::multiply_add(value, x[r][i], partial[r][i % kChains]);
        }
        const F32 scale = scales_of(c);
        BNB_UNROLL for (int r = 0; r < rows; r++) {
          F32 sum = partial[r][0];
          for (int chain = 1; chain < kChains; chain++) sum += partial[r][chain];
          sums[r][c] = fma(sum, scale, sums[r][c]);
        }
      }
    }
  }
  BNB_UNROLL for (int r = 0; r < rows; r++) {
    BNB_UNROLL for (int c = 0; c < columns; c++) result[r][c] += sums[r][c];
  }
}

// A few rows of A: codes are looked up, multiplied and summed in registers, and a block's scale is applied to
// its partial sums. Every column reads a part of W of its own from front to back: few long streams are what
// memory delivers fastest. Where A's rows do not fit into the first-level cache, a block of rows of W takes
// turns with the part of them that does.
template <class Products, int rows>
void gemv(const Product<typename Products::Element>& product, int64_t begin, int64_t end) {
  constexpr int columns = Products::columns(rows), kBlock = Products::block(rows);
  constexpr int64_t kCachedGroups = kCachedBytes / (rows * kGroup * sizeof(typename Products::Element));
  const int64_t most_groups = kBlock == 1 ? kChunkGroups : min(kChunkGroups, kCachedGroups);
  const int64_t chunks = max(ceil_div(product.groups, most_groups), 1);
  const int64_t chunk = ceil_div(product.groups, chunks);
  const int64_t ahead = kBlock == 1 ? kPrefetchBytes : product.row_bytes();
  const Products products(product.code);
  const int64_t part = ceil_div(end - begin, columns);
  RowReader readers[columns];
  for (int64_t first = 0; first < part; first += kBlock) {
    const int64_t count = min(kBlock, part - first);
    const auto row_of = [&](int64_t i, int c) {
      return product.weight_row(min(begin + c * part + first + i, end - 1));
    };
    F32 sums[kBlock][rows][columns] = {};
    for (int64_t group = 0; group < product.groups; group += chunk) {
      const int groups = static_cast<int>(min(chunk, product.groups - group));
      for (int64_t i = 0; i < count; i++) {
        bool steady = true;
        for (int c = 0; c < columns; c++) {
          readers[c].start(product.w, product.stored, row_of(i, c), ahead);
          readers[c].open(group, groups);
          steady &= readers[c].steady(groups, readers[0]);
        }
        const auto add =
            steady ? add_chunk<true, Products, rows, columns> : add_chunk<false, Products, rows, columns>;
        add(products, readers, groups, product.a + group * rows * kGroup, sums[i]);
      }
    }
    for (int64_t i = 0; i < count; i++) {
      for (int c = 0; c < columns; c++) {
        for (int r = 0; r < rows; r++) product.y[r * product.w.N + row_of(i, c)] = reduce_add(sums[i][r][c]);
      }
    }
  }
}

template <class Products, int rows>
void multiply(const Product<typename Products::Element>& product, int64_t begin, int64_t end) {
  if (product.rows == rows) return gemv<Products, rows>(product, begin, end);
  if constexpr (rows > 1) multiply<Products, rows - 1>(product, begin, end);
}

// y f32[M, N] = a @ w^T for up to Products::kMostRows rows.
template <class Products, class T>
void multiply_rows(const Gemm4bit<T>& gemm, float* y) {
  using Element = typename Products::Element;
  const Weight4bit& w = gemm.w;
  int64_t phases = 1;
  while (phases * w.K % kWord != 0) phases *= 2;
  const int64_t max_groups = ceil_div(w.K + kWord - 1, kGroup);
  const Buffer<Element> rearranged(gemm.M * max_groups * kGroup);
  for (int64_t phase = 0; phase < min(phases, w.N); phase++) {
    const int64_t zeros = phase * w.K % kWord;
    const int64_t groups = ceil_div(zeros + w.K, kGroup);
    parallel_for(gemm.M, grain(w.K, kDecodedShare), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        rearrange_row<Products>(gemm.a + r * w.K, w.K, zeros, groups, gemm.M * kGroup,
                                rearranged.data() + r * kGroup);
      }
    });
    const Product<Element> product{w,      stored_scales(w), gemm.code, phase, phases, rearranged.data(),
                                   gemm.M, groups,           y};
    parallel_for(product.weight_rows(), grain(w.K, kMultipliedShare), [&](int64_t begin, int64_t end) {
      multiply<Products, Products::kMostRows>(product, begin, end);
    });
  }
}

template <class Products, class T>
void gemv_4bit(const Gemm4bit<T>& gemm) {
  const int64_t N = gemm.w.N;
  const Buffer<float> y(gemm.M * N);
  multiply_rows<Products>(gemm, y.data());
  parallel_for(gemm.M, grain(N, kDecodedShare), [&](int64_t begin, int64_t end) {
    gemm.result.finish(y.data() + begin * N, N, {begin, end - begin, 0, N});
  });
}

}  // namespace
}  // namespace bnb::BNB_TARGET
