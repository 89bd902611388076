// Products with a 4-bit weight on tensor cores, for half and bfloat16 and any number of rows.
//
// Y^T = W X^T: rows of the weight are the rows of the mma, rows of X its columns, so that one row of X costs
// what eight do. A weight is decoded by one look-up for each byte, in a table of pairs that is kept once for
// each lane: the pair is a register of the mma's operand as it stands. Codes are rounded to T, not weights:
// scales are applied in f32, to the sums over a segment that lies in one block.
//
// A block of 8 warps takes row_warps * 32 rows of W and all of its rows of X; the warps that share rows
// split K and add up in shared memory. Where N is small, blocks split K too and leave partial sums to a
// second kernel. Every sum has a fixed order.
//
// Counted in sm_90's machine code for M up to 8 and blocks of 64: a step of a warp (2 KiB of codes, 64 bytes
// a lane) is about 385 instructions, 6 for each byte and lane, where an H200 can issue about 7.8 in the
// time its memory takes to deliver that byte (132 multiprocessors * 128 lanes * 1.98 GHz / 4.3 TB/s). 192 of
// them decode: a shift, a logical operation and a look-up for each byte. Shared memory and L1 are the tighter
// limit: some 105 of the 124 accesses of 128 bytes that fit into that time, 64 of them look-ups.
#pragma once

#include "async_copy.h"
#include "device_limits.h"
#include "gemm_4bit.h"
#include "pair_table.h"
#include "segment_sums.h"
#include "split_k.h"

namespace bnb {

// A weight is loaded and multiplied in segments of 64 codes of a row, or of 32, each of which lies in one
// block. A warp takes one or two of them in one step.
template <int length_, int count_>
struct Segments {
  static constexpr int length = length_, count = count_, span = length * count;
};

// How the work is shared out.
struct MmaPlan {
  int row_warps, k_warps;  // their product is kMmaWarps
  int copied_row_step;     // from one row of X to the next that a thread copies
  int row_blocks;
  SplitK split;
};

// The part of X that a block's warps multiply in one step: [k_warps][rows][span], in pieces of 16 bytes.
template <class T, int rows, class Segments>
class StagedX {
 public:
  static constexpr int kPiece = 16 / static_cast<int>(sizeof(T));  // elements
  static constexpr int kPieces = Segments::span / kPiece;
  static constexpr int kBytes = rows * Segments::span * static_cast<int>(sizeof(T));  // of one warp
  using Piece = Pack<uint32_t, 4>;

  // A thread copies the same piece of every so many rows, from column k on.
  __device__ StagedX(const T* x, int valid, int64_t K, int k, int k_warps) : valid_(valid) {
    const int width = k_warps * kPieces;
    const int piece = static_cast<int>(threadIdx.x) % width, row = static_cast<int>(threadIdx.x) / width;
    place_ = place(piece / kPieces, row, piece % kPieces);
    source_ = x + row * K + k + piece * kPiece;
    columns_left_ = static_cast<int>(K) - k - piece * kPiece;
    if (valid == rows) return;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * k_warps * rows * kPieces; i += kMmaThreads)
      if (i / kPieces % rows >= valid) stages()[i] = Piece{};
  }

  // Starts to copy the columns of the next step; zeros where K ends.
  __device__ void copy(int64_t K, int k_warps, int row_step, int stage) {
    const bool inside = columns_left_ > 0;
    const T* source = inside ? source_ : source_ + columns_left_ - kPiece;
    Piece* to = stages() + stage * k_warps * rows * kPieces + place_;
#pragma unroll 1
    for (int row = place_ / kPieces % rows; row < valid_; row += row_step) {
      copy_async(to, source, inside);
      source += row_step * K;
      to += row_step * kPieces;
    }
    source_ += k_warps * Segments::span;
    columns_left_ -= k_warps * Segments::span;
  }

  // Where this lane reads in a stage.
  __device__ static int place_of_lane(int stage, int k_warps, int k_warp) {
    return place(stage * k_warps + k_warp, lane() / kQuad, lane() % kQuad * (Segments::length / 32));
  }

  // What the lane holds of segment s for rows 8 * tile and on, its i-th piece.
  __device__ static Piece read(int place, int tile, int s, int i) {
    const int flipped = place ^ (kIsLong ? i : s * kFlip);
    return stages()[flipped + (kIsLong ? s * 8 : 0) + tile * kMmaColumns * kPieces];
  }

 private:
  // In odd rows a bit of the piece's number is flipped, so that the lanes of two rows, which read at once,
  // meet in no bank.
  static constexpr bool kIsLong = Segments::length == 64;
  static constexpr int kFlip = kIsLong ? 1 : Segments::count == 2 ? 4 : 0;

  // Two stages, behind the table.
  __device__ static Piece* stages() {
    return reinterpret_cast<Piece*>(dynamic_shared<unsigned char>() + PairTable<T>::kBytes);
  }

  __device__ static int place(int k_warp, int row, int piece) {
    return (k_warp * rows + row) * kPieces + (piece ^ row % 2 * kFlip);
  }

  const T* source_;
  int valid_, place_, columns_left_;
};

// What a lane holds of a warp's 32 rows of W for one step: a quarter of each segment of rows g + 8r.
template <class Segments>
struct WeightStep {
  Pack<uint32_t, Segments::length / 32> codes[Segments::count][4];
  // A lane of a quad keeps one segment's scales, of as many of the rows as there are segments.
  StoredScale scales[Segments::count];
  bool has_scales;
};

// Loads one step after the other.
template <class Segments>
class WeightStream {
 public:
  static constexpr int kWords = Segments::length / 32;

  // Of kWarpRows rows from column k on.
  __device__ WeightStream(const WeightView& weight, int64_t first_row, int k)
      : column_(k), K_(static_cast<int>(weight.K)) {
    const int t = lane() % kQuad, g = lane() / kQuad;
    codes_ = weight.packed + (first_row + g) * weight.K / 2 + t * kWords * 4;
    scale_row_ = (first_row + g + t / Segments::count * Segments::count * 8) * weight.K;
  }

  // Past the end of K it loads what was there before, and says so of the scales.
  __device__ void load(const WeightView& weight, int step_width, WeightStep<Segments>& step) {
#pragma unroll
    for (int s = 0; s < Segments::count; s++) {
      const uint8_t* row = codes_ + (min(column_ + s * Segments::length, K_ - Segments::length) >> 1);
#pragma unroll
      for (int r = 0; r < 4; r++) {
        step.codes[s][r] = load_streaming<kWords>(row);
        row += 4 * weight.K;
      }
    }
    const int column = column_ + lane() % Segments::count * Segments::length;
    step.has_scales = column < K_;
#pragma unroll
    for (int i = 0; i < Segments::count; i++) {
      const int64_t place = scale_row_ + i * 8 * weight.K + min(column, K_ - Segments::length);
      step.scales[i] = weight.scales.load(place >> weight.block_shift);
    }
    column_ += step_width;
  }

 private:
  int column_, K_;
  const uint8_t* codes_;
  int64_t scale_row_;
};

template <class T, int n_tiles, class Segments>
class MmaTile {
 public:
  static constexpr int kRows = n_tiles * kMmaColumns;  // of X
  using X = StagedX<T, kRows, Segments>;
  using Step = WeightStep<Segments>;
  using Sums = SegmentSums<T, n_tiles, Segments::length>;

  // Adds the products of a step with a stage of X, of which the lane reads from `place` on.
  __device__ void add(const WeightView& weight, float offset, const Step& step, PairTable<T> table,
                      int place) {
    constexpr int kScales = Segments::count;
    float decoded[kScales];
#pragma unroll
    for (int i = 0; i < kScales; i++)
      decoded[i] = step.has_scales ? weight.scales.decode(step.scales[i], offset) : 0.0f;
#pragma unroll
    for (int s = 0; s < Segments::count; s++) {
      typename Sums::Operand w;
      float scales[4];
#pragma unroll
      for (int r = 0; r < 4; r++) {
        scales[r] = shuffle_lanes<kQuad>(decoded[r % kScales], r / kScales * kScales + s);
#pragma unroll
        for (int byte = 0; byte < 2 * Sums::kSteps; byte++)
          Sums::pair(w, r, byte) = bits_of_pair(table.of_byte(step.codes[s][r][byte / 4], byte % 4));
      }
      segments.add(w, scales, [&](int tile, int i) { return X::read(place, tile, s, i); });
    }
  }

  Sums segments;
};

// Blocks that share a multiprocessor: two hide more latency, as far as registers and shared memory suffice.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kMostTilesForTwoBlocks = 1;
#else
constexpr int kMostTilesForTwoBlocks = 2;
#endif

// Where a block is: rows of X and of W, and the part of K.
template <class T>
struct MmaPlace {
  const T* X;
  int x_rows;
  int64_t first_n, end_n;  // of the weight's rows, those of the block and where they end
  int part;
};

// The products of a block: store(m, n, sum) takes them, m from the place's first row of X on.
template <class T, int n_tiles, class Segments, class Codebook, class Store>
__device__ inline void multiply_mma_block(const WeightView& weight, const Codebook& codebook,
                                          const MmaPlan& plan, const MmaPlace<T>& place, const Store& store) {
  using Tile = MmaTile<T, n_tiles, Segments>;
  using X = typename Tile::X;
  const int row_warp = warp() % plan.row_warps, k_warp = warp() / plan.row_warps;
  const int block_rows = plan.row_warps * kWarpRows;
  // The last warps take rows that others have too, so that none reads past the end.
  const auto first_row = [&](int warp) {
    return min(place.first_n + warp * kWarpRows, place.end_n - kWarpRows);
  };
  const int step_width = plan.k_warps * Segments::span;
  const int k = place.part * plan.split.steps_per_split * step_width;
  unsigned char* const shared = dynamic_shared<unsigned char>();

  WeightStream<Segments> stream(weight, first_row(row_warp), k + k_warp * Segments::span);
  typename Tile::Step step, next = {};
  stream.load(weight, step_width, next);
  X x(place.X, place.x_rows, weight.K, k, plan.k_warps);
  x.copy(weight.K, plan.k_warps, plan.copied_row_step, 0);
  const PairTable<T> table(shared);
  const CodeFactor factor = factor_of(codebook);
  table.template fill<kMmaThreads>(codebook, factor.of_codes);

  Tile tile;
  const float offset = weight.scales.offset();
  const int steps = min(plan.split.steps_per_split, static_cast<int>(ceil_div(weight.K - k, step_width)));
#pragma unroll 1
  for (int i = 0; i < steps; i++) {
    wait_for_copies();
    __syncthreads();
    const int stage = i % 2;
    step = next;
    if (i + 1 < steps) {
      stream.load(weight, step_width, next);
      x.copy(weight.K, plan.k_warps, plan.copied_row_step, 1 - stage);
    }
    tile.add(weight, offset, step, table, X::place_of_lane(stage, plan.k_warps, k_warp));
  }

  __syncthreads();
  using Sums = MmaSums<float, n_tiles>;
  float* const sums = reinterpret_cast<float*>(shared);
  tile.segments.sums.store(sums, k_warp, row_warp, block_rows);
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x) % block_rows;
  const int64_t row_shift = first_row(row / kWarpRows) - (place.first_n + row / kWarpRows * kWarpRows);
  if (row % kWarpRows + row_shift < 0) return;  // an earlier warp's row
  for (int m = static_cast<int>(threadIdx.x) / block_rows; m < place.x_rows; m += kMmaThreads / block_rows)
    store(m, place.first_n + row + row_shift,
          Sums::add(sums, plan.k_warps, m, row, block_rows) * factor.of_sums);
}

template <class T, int n_tiles, class Segments, class Codebook>
__global__ void __launch_bounds__(kMmaThreads, n_tiles <= kMostTilesForTwoBlocks ? 2 : 1)
    gemm_4bit_mma_kernel(Gemm4bit<T> gemm, Codebook codebook, MmaPlan plan) {
  constexpr int64_t kRows = MmaTile<T, n_tiles, Segments>::kRows;
  const WeightView& weight = gemm.weight;
  const int block = static_cast<int>(blockIdx.x);
  const int part = block / plan.row_blocks % plan.split.splits;
  const int64_t first_m = block / plan.row_blocks / plan.split.splits * kRows;
  const int64_t first_n = int64_t{block % plan.row_blocks} * plan.row_warps * kWarpRows;
  const MmaPlace<T> place{gemm.A + first_m * weight.K, static_cast<int>(min(gemm.M - first_m, kRows)),
                          first_n, weight.N, part};
  multiply_mma_block<T, n_tiles, Segments>(weight, codebook, plan, place, [&](int m, int64_t n, float sum) {
    if (plan.split.splits == 1) {
      store_output(gemm, first_m + m, n, sum);
    } else {
      plan.split.partials[(part * gemm.M + first_m + m) * weight.N + n] = sum;
    }
  });
}

// Blocks of so many rows that reading X again for each of them costs half of what the weight does, if that
// leaves enough blocks to fill the chip; where even the lowest blocks are too few, splits of K.
template <class Tile, class Segments>
MmaPlan mma_plan(int64_t M, int64_t N, int64_t K) {
  constexpr int kMostStagedBytes = 16 * 1024;  // 64 KiB in all, which every chip has
  constexpr int kRowsPerRowOfX = 8;
  constexpr int64_t kFewestSteps = 2;
  const int64_t multiprocessors = device_limits().multiprocessors;
  const int64_t m_tiles = ceil_div(M, Tile::kRows);
  const auto row_blocks = [&](int row_warps) { return ceil_div(N, row_warps * kWarpRows); };
  int row_warps = kMmaWarps / std::min(kMmaWarps, kMostStagedBytes / Tile::X::kBytes);
  while (row_warps < kMmaWarps &&
         row_warps * kWarpRows < kRowsPerRowOfX * std::min<int64_t>(M, Tile::kRows) &&
         row_blocks(2 * row_warps) * m_tiles * 4 >= multiprocessors * 3)
    row_warps *= 2;

  MmaPlan plan = {};
  plan.row_warps = row_warps;
  plan.k_warps = kMmaWarps / row_warps;
  plan.copied_row_step = kMmaThreads / (plan.k_warps * Tile::X::kPieces);
  plan.row_blocks = static_cast<int>(row_blocks(row_warps));
  plan.split = split_k(plan.row_blocks * m_tiles, ceil_div(K, plan.k_warps * Segments::span), kFewestSteps);
  return plan;
}

// The length of the segments of K in which this kernel can take the weight: each row a whole number of them,
// each of them in one block. 0 where it cannot, and where K is so short that rounding the codes would not
// average out.
template <class T>
int mma_segment(const Gemm4bit<T>& gemm) {
  const int64_t K = gemm.weight.K;
  if (!has_mma<T>() || K < kLeastTerms || K > kMostMmaColumns || gemm.weight.N < kWarpRows ||
      !is_aligned(gemm.A, 16))
    return 0;
  if (K % 64 == 0 && gemm.weight.block_shift >= 6 && is_aligned(gemm.weight.packed, 8)) return 64;
  if (K % 32 == 0 && is_aligned(gemm.weight.packed, 4)) return 32;
  return 0;
}

template <class T, int n_tiles, int segment, class Codebook>
void launch_gemm_4bit_mma(const Gemm4bit<T>& gemm, const Codebook& codebook, Stream stream) {
  using Parts = Segments<segment, n_tiles == 8 ? 1 : 2>;
  using Tile = MmaTile<T, n_tiles, Parts>;
  MmaPlan plan = mma_plan<Tile, Parts>(gemm.M, gemm.weight.N, gemm.weight.K);
  const size_t staged = 2 * plan.k_warps * Tile::X::kBytes;
  const size_t sums = MmaSums<float, n_tiles>::kBytes;
  const int64_t blocks = int64_t{plan.row_blocks} * plan.split.splits * ceil_div(gemm.M, Tile::kRows);
  multiply_in_splits(gemm, plan.split, stream, [&](const SplitK& with_memory) {
    plan.split = with_memory;
    launch("gemm_4bit", gemm_4bit_mma_kernel<T, n_tiles, Parts, Codebook>, blocks, kMmaThreads, stream,
           std::max(PairTable<T>::kBytes + staged, sums), gemm, codebook, plan);
  });
}

}  // namespace bnb
