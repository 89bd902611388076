// Products of many rows with a 4-bit weight on Hopper's tensor cores, for half and bfloat16.
//
// Y^T = W X^T: a warpgroup takes 64 rows of W, which it decodes into the registers of the first operand, and
// reads rows of X as the second from shared memory. A weight is its code times its scale in f32, rounded
// once: the bits that dequantizing gives. While the tensor cores multiply one step of 64 columns, the threads
// decode the next one.
//
// csrc_cuda/README.md has what it is limited by.
#pragma once

#include "async_copy.h"
#include "pair_table.h"
#include "split_k.h"
#include "wgmma.h"

namespace bnb {

constexpr int kWgmmaThreads = 256;
constexpr int kWgmmaBlockRows = kWgmmaThreads / kWarpgroup * kWgmmaRows;  // of W

// What a block reads in one step, how many steps of it lie in shared memory at a time, and where.
template <class T, int tiles>
struct WgmmaStages {
  static constexpr int kDepth = SwizzledRows::kBytes / static_cast<int>(sizeof(T));  // columns of X and W
  static constexpr int kRows = tiles * kWgmmaColumns;                                // of X
  static constexpr int kCodeBytes = kDepth / 2;                                      // of a row of W
  static constexpr int kXBytes = kRows * SwizzledRows::kBytes;
  static constexpr int kWBytes = kWgmmaBlockRows * kCodeBytes;
  static constexpr int kCount = tiles == 1 ? 8 : 5;
  static constexpr int kBytes = kCount * (kXBytes + kWBytes);
  static_assert(kXBytes % SwizzledRows::kAlignment == 0);

  __device__ static unsigned char* x(int step) {
    return dynamic_shared<unsigned char>() + step % kCount * kXBytes;
  }
  __device__ static unsigned char* codes(int step) {
    return dynamic_shared<unsigned char>() + kCount * kXBytes + step % kCount * kWBytes;
  }
  __device__ static unsigned char* table() { return dynamic_shared<unsigned char>() + kBytes; }

  // A row's two pieces of 16 bytes change places in every other four rows, so that eight rows meet in no
  // bank.
  __device__ static int place_of_code(int row, int byte) {
    return row * kCodeBytes + (byte ^ row / 4 % 2 * kAccessBytes);
  }
};

// A thread's share of the copies: a piece of every 32nd row of X, and one of W's codes.
template <class T, class Stages>
class WgmmaCopies {
 public:
  __device__ WgmmaCopies(const Gemm4bit<T>& gemm, int64_t first_m, int64_t first_n, int k)
      : columns_(gemm.weight.K) {
    const int thread = static_cast<int>(threadIdx.x);
    const int row = thread / SwizzledRows::kPieces, piece = thread % SwizzledRows::kPieces;
    x_ = gemm.A + (first_m + row) * columns_ + k + piece * (kAccessBytes / static_cast<int>(sizeof(T)));
    x_place_ = SwizzledRows::place_of_piece(row, piece);
    rows_left_ = static_cast<int>(min(gemm.M - first_m, static_cast<int64_t>(Stages::kRows))) - row;
    // The last block's rows past the end are the last one's, so that none is read past the end.
    const int code_row = thread / 2, byte = thread % 2 * kAccessBytes;
    const int64_t n = min(first_n + code_row, gemm.weight.N - 1);
    codes_ = gemm.weight.packed + (n * columns_ + k) / 2 + byte;
    code_place_ = Stages::place_of_code(code_row, byte);
  }

  // Starts to copy the next step. Rows past the last one of X are left out: nobody stores the columns that
  // they make of the product.
  __device__ void copy(int step) {
    unsigned char* const to = Stages::x(step) + x_place_;
    const T* from = x_;
#pragma unroll
    for (int i = 0; i < Stages::kRows / kRowStep; i++) {
      if (i * kRowStep < rows_left_) copy_async(to + i * kRowStep * SwizzledRows::kBytes, from, true);
      from += kRowStep * columns_;
    }
    copy_async(Stages::codes(step) + code_place_, codes_, true);
    x_ += Stages::kDepth;
    codes_ += Stages::kCodeBytes;
  }

 private:
  static constexpr int kRowStep = kWgmmaThreads / SwizzledRows::kPieces;
  static_assert(kRowStep % 8 == 0, "all of a thread's rows are swizzled alike");
  static_assert(kWgmmaThreads == kWgmmaBlockRows * Stages::kCodeBytes / kAccessBytes,
                "one piece of codes each");

  int64_t columns_;
  const T* x_;
  const uint8_t* codes_;
  int x_place_, code_place_, rows_left_;
};

// The scales of a lane's two rows, step after step. Of four steps each lane of a quad keeps one's.
class WgmmaScales {
 public:
  __device__ WgmmaScales(const WeightView& weight, const int64_t (&rows)[2], int k, int depth)
      : weight_(weight), offset_(weight.scales.offset()), depth_(depth), column_(k + lane() % kQuad * depth) {
#pragma unroll
    for (int i = 0; i < 2; i++) first_[i] = rows[i] * weight.K;
    load();
  }

  // Those of a step; called for each in turn. What a step decodes was loaded three steps before.
  __device__ void read(int step, float (&scales)[2]) {
    if (step % kQuad == 0) {
#pragma unroll
      for (int i = 0; i < 2; i++) decoded_[i] = weight_.scales.decode(stored_[i], offset_);
    }
    if (step % kQuad == 1) load();
#pragma unroll
    for (int i = 0; i < 2; i++) scales[i] = shuffle_lanes<kQuad>(decoded_[i], step % kQuad);
  }

 private:
  // Past the end of K it loads some of the row's.
  __device__ void load() {
    const int64_t column = min(static_cast<int64_t>(column_), weight_.K - 1);
#pragma unroll
    for (int i = 0; i < 2; i++) stored_[i] = weight_.scales.load((first_[i] + column) >> weight_.block_shift);
    column_ += kQuad * depth_;
  }

  const WeightView& weight_;
  float offset_, decoded_[2];
  StoredScale stored_[2];
  int64_t first_[2];
  int depth_, column_;
};

// A thread's part of the products of its block.
template <class T, int tiles>
class WgmmaTile {
 public:
  using Stages = WgmmaStages<T, tiles>;
  static constexpr int kProducts = Stages::kDepth / kWgmmaDepth;  // of a step, one after the other
  using Operand = uint32_t[kProducts][4];

  // The rows of W in the block that the lane holds are the first one and eight further on.
  __device__ static int first_row() { return warp() * 16 + lane() / kQuad; }

  // Decodes the lane's weights of a step: a byte of every word of its rows.
  __device__ static void decode(int step, const float (&scales)[2], Operand& w) {
    using Words = Pack<uint32_t, 4>;
    const PairTable<float> table(Stages::table());
    const unsigned char* const codes = Stages::codes(step);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = i % 2, piece = i / 2;
      const auto words = *reinterpret_cast<const Words*>(
          codes + Stages::place_of_code(first_row() + row * 8, piece * kAccessBytes));
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const auto pair = table.of_byte(words[j], lane() % kQuad);
        w[piece * 2 + j / 2][j % 2 * 2 + row] = bits_of_pair(
            Pack<T, 2>{from_float<T>(pair[0] * scales[row]), from_float<T>(pair[1] * scales[row])});
      }
    }
  }

  // Starts to multiply them.
  __device__ void multiply(int step, Operand& w) {
    wgmma_fence(w);
    const SwizzledRows x(Stages::x(step));
#pragma unroll
    for (int i = 0; i < kProducts; i++) {
#pragma unroll
      for (int tile = 0; tile < tiles; tile++)
        wgmma_64x128x16<T>(sums[tile], w[i],
                           x.from(tile * kWgmmaColumns, i * kWgmmaDepth * static_cast<int>(sizeof(T))));
    }
    wgmma_commit();
  }

  // Calls store(column of the block's X, which of the lane's rows, sum).
  template <class Store>
  __device__ void for_each_sum(const Store& store) const {
#pragma unroll
    for (int tile = 0; tile < tiles; tile++) {
#pragma unroll
      for (int i = 0; i < kWgmmaSums; i++)
        store(tile * kWgmmaColumns + i / 4 * 8 + lane() % kQuad * 2 + i % 2, i / 2 % 2, sums[tile][i]);
    }
  }

  float sums[tiles][kWgmmaSums] = {};
};

// Stores the products of a block by way of shared memory, so that neighbours in a row go out together.
template <class T, int tiles>
__device__ inline void store_wgmma_tile(const Gemm4bit<T>& gemm, const WgmmaTile<T, tiles>& tile,
                                        int64_t first_m, int64_t first_n) {
  constexpr int kPiece = kAccessBytes / static_cast<int>(sizeof(T));
  constexpr int kPieces = kWgmmaBlockRows / kPiece;
  constexpr int kWidth = kWgmmaBlockRows + kPiece;  // the padding keeps lanes out of each other's banks
  using Tile = WgmmaTile<T, tiles>;
  static_assert(Tile::Stages::kRows * kWidth * sizeof(T) <= Tile::Stages::kBytes);
  const int64_t N = gemm.weight.N;
  T* const staged = dynamic_shared<T>();
  float bias[2] = {};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int64_t n = first_n + Tile::first_row() + i * 8;
    if (gemm.bias && n < N) bias[i] = to_float(gemm.bias[n]);
  }
  __syncthreads();
  tile.for_each_sum([&](int m, int row, float sum) {
    staged[m * kWidth + Tile::first_row() + row * 8] = from_float<T>(gemm.bias ? sum + bias[row] : sum);
  });
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x) % kPieces * kPiece;
  const int64_t valid = N - first_n - column;
  const bool whole = valid >= kPiece && N % kPiece == 0 && are_aligned<kPiece>(gemm.out);
  const int rows = static_cast<int>(min(gemm.M - first_m, static_cast<int64_t>(Tile::Stages::kRows)));
  for (int m = static_cast<int>(threadIdx.x) / kPieces; m < rows; m += kWgmmaThreads / kPieces) {
    T values[kPiece];
    load(staged + m * kWidth + column, true, kPiece, values);
    store(gemm.out + (first_m + m) * N + first_n + column, whole, valid, values);
  }
}

template <class T, int tiles>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    gemm_4bit_wgmma_kernel(Gemm4bit<T> gemm, Codebook4bit codebook, SplitK split) {
#if defined(__CUDA_ARCH__) && !defined(BNB_HOPPER)
  __trap();  // has_wgmma() is false
#else
  using Tile = WgmmaTile<T, tiles>;
  using Stages = typename Tile::Stages;
  const WeightView& weight = gemm.weight;
  // Blocks with the same rows of W are neighbours: the cache has them for all.
  const int64_t m_blocks = ceil_div(gemm.M, Stages::kRows), n_blocks = ceil_div(weight.N, kWgmmaBlockRows);
  const int64_t first_m = int64_t{blockIdx.x} % m_blocks * Stages::kRows;
  const int64_t first_n = int64_t{blockIdx.x} / m_blocks % n_blocks * kWgmmaBlockRows;
  const int part = static_cast<int>(blockIdx.x / (m_blocks * n_blocks));
  const int k = part * split.steps_per_split * Stages::kDepth;
  const int steps = min(split.steps_per_split, (static_cast<int>(weight.K) - k) / Stages::kDepth);

  // A step's copies are started so many steps before its products: all stages but the one in use.
  constexpr int kAhead = Stages::kCount - 1;
  WgmmaCopies<T, Stages> copies(gemm, first_m, first_n, k);
#pragma unroll
  for (int step = 0; step < kAhead - 1; step++) {
    if (step < steps) copies.copy(step);
    commit_copies();
  }
  const int64_t n = first_n + Tile::first_row();
  WgmmaScales scale_stream(weight, {min(n, weight.N - 1), min(n + 8, weight.N - 1)}, k, Stages::kDepth);
  PairTable<float>(Stages::table()).template fill<kWgmmaThreads>(codebook);

  Tile tile;
  float scales[2];
  typename Tile::Operand even, odd;
  // Makes the step after this one ready: its copies are shown to all threads, its weights decoded. Past the
  // barrier no product of the step before this one is under way, and its stage is free for the next copies.
  const auto prepare_next = [&](int step, typename Tile::Operand& next) {
    wait_for_copies<kAhead - 2>();
    show_to_wgmma();
    __syncthreads();
    if (step + kAhead < steps) copies.copy(step + kAhead);
    commit_copies();
    scale_stream.read(step + 1, scales);
    Tile::decode(step + 1, scales, next);
  };
  const auto advance = [&](int step, typename Tile::Operand& current, typename Tile::Operand& next) {
    tile.multiply(step, current);
    wgmma_wait<1>();
    prepare_next(step, next);
  };
  prepare_next(-1, even);
#pragma unroll 1
  for (int step = 0; step < steps; step += 2) {
    advance(step, even, odd);
    if (step + 1 < steps) advance(step + 1, odd, even);
  }
  wgmma_wait<0>();

  if (split.splits == 1) return store_wgmma_tile(gemm, tile, first_m, first_n);
  tile.for_each_sum([&](int column, int row, float sum) {
    const int64_t m = first_m + column;
    if (m < gemm.M && n + row * 8 < weight.N)
      split.partials[(part * gemm.M + m) * weight.N + n + row * 8] = sum;
  });
#endif
}

// Whether this kernel multiplies so on the current device: K is whole steps, each of them in one block of
// scales, and not so short that rounding the weights would not average out.
template <class T>
bool fits_wgmma(const Gemm4bit<T>& gemm) {
  constexpr int kDepth = WgmmaStages<T, 1>::kDepth;
  const WeightView& weight = gemm.weight;
  return has_wgmma() && !std::is_same_v<T, float> && weight.K % kDepth == 0 && weight.K >= kLeastTerms &&
         weight.K <= kMostMmaColumns && int64_t{1} << weight.block_shift >= kDepth &&
         is_aligned(gemm.A, kAccessBytes) && is_aligned(weight.packed, kAccessBytes);
}

// How the work is shared out, and an estimate of the time that it takes, in cycles of a multiprocessor.
struct WgmmaPlan {
  int64_t blocks, cycles;
  SplitK split;
};

template <int tiles>
WgmmaPlan wgmma_plan(int64_t M, int64_t N, int64_t K, int depth) {
  constexpr int64_t kFewestSteps = 8;
  // Of shared memory: look-ups, codes and their copies; reading and copying each 128 rows of X.
  constexpr int64_t kCyclesOfStep = 256 + 128 + 32 + tiles * (256 + 128);
  const int64_t tiles_of_result = ceil_div(M, tiles * kWgmmaColumns) * ceil_div(N, kWgmmaBlockRows);
  WgmmaPlan plan = {};
  plan.split = split_k(tiles_of_result, K / depth, kFewestSteps);
  plan.blocks = tiles_of_result * plan.split.splits;
  const int64_t waves = ceil_div(plan.blocks, device_limits().multiprocessors);
  plan.cycles = waves * plan.split.steps_per_split * kCyclesOfStep;
  return plan;
}

template <class T, int tiles>
void launch_gemm_4bit_wgmma(const Gemm4bit<T>& gemm, const WgmmaPlan& plan, const Codebook4bit& codebook,
                            Stream stream) {
  using Stages = WgmmaStages<T, tiles>;
  multiply_in_splits(gemm, plan.split, stream, [&](const SplitK& split) {
    launch("gemm_4bit", gemm_4bit_wgmma_kernel<T, tiles>, plan.blocks, kWgmmaThreads, stream,
           Stages::kBytes + PairTable<float>::kBytes, gemm, codebook, split);
  });
}

// Blocks with 256 rows of X read and decode less for each product; with 128 there are more, which may fill
// the chip better.
template <class T>
void launch_gemm_4bit_wgmma(const Gemm4bit<T>& gemm, const Codebook4bit& codebook, Stream stream) {
  constexpr int kDepth = WgmmaStages<T, 1>::kDepth;
  const auto one = wgmma_plan<1>(gemm.M, gemm.weight.N, gemm.weight.K, kDepth);
  const auto two = wgmma_plan<2>(gemm.M, gemm.weight.N, gemm.weight.K, kDepth);
  if (one.cycles < two.cycles) return launch_gemm_4bit_wgmma<T, 1>(gemm, one, codebook, stream);
  launch_gemm_4bit_wgmma<T, 2>(gemm, two, codebook, stream);
}

}  // namespace bnb
