// Products with a 4-bit weight on tensor cores, for half and bfloat16, with several steps of the weight on
// their way to shared memory.
//
// They multiply as gemm_4bit_mma.h does and share out the rows of W and the parts of K alike, but a block
// stays on its multiprocessor: while it finishes one part of the product, the codes of the next one are
// already under way. Codes and X are copied asynchronously, so that they take no registers, and codes leave
// the L2 first. A warp copies the codes that it multiplies; where no other warp has the same part of K, it
// waits for nobody else until its rows are summed up.
//
// csrc_cuda/README.md has what it is limited by.
#pragma once

#include "gemm_4bit_mma.h"
#include "permuted_codes.h"
#include "staged_weight.h"

namespace bnb {

template <class T, class Shape>
class StagedTile {
 public:
  using Memory = StagedMemory<T, Shape>;
  using Sums = SegmentSums<T, Shape::kTiles, kStagedSegment>;

  // Adds the products of a stage.
  template <class Permuted>
  __device__ void add(const Memory& memory, int stage, const StagedWeightScales<Shape>& weight_scales,
                      PairTable<T> table, const Permuted& permuted) {
    const auto w_codes = memory.lane_codes(stage);
    const auto x = memory.lane_x(stage);
#pragma unroll 1  // or the compiler starts the next one early, and runs out of registers
    for (int s = 0; s < Shape::kSegments; s++) {
      typename Sums::Operand w;
      float scales[4];
#pragma unroll
      for (int r = 0; r < 4; r++) {
        scales[r] = weight_scales.of(s, r);
        const auto codes = w_codes.read(s, r);
#pragma unroll
        for (int half = 0; half < 4; half++) {
          const uint32_t word = codes[half / 2];
          uint32_t pairs[2];
          if (half < Shape::kPermuted) {
            permuted.of_half(word, half % 2, pairs);
          } else {
            pairs[0] = bits_of_pair(table.of_byte(word, half % 2 * 2));
            pairs[1] = bits_of_pair(table.of_byte(word, half % 2 * 2 + 1));
          }
          Sums::pair(w, r, half * 2) = pairs[0];
          Sums::pair(w, r, half * 2 + 1) = pairs[1];
        }
      }
      segments.add(w, scales, [&](int tile, int i) { return x.read(s, tile, i); });
    }
  }

  // Adds up what the warps have that share rows, and stores it.
  __device__ void store(const Gemm4bit<T>& gemm, const StagedPlan& plan, const StagedShare& share,
                        int row_tile, float factor) const {
    using TileSums = MmaSums<float, 1>;
    const Memory memory(plan);
    const int block_rows = plan.row_warps * kWarpRows, thread = late_warp() * kWarp + late_lane();
    const int row_warp = memory.row_warp_of(late_warp()), k_warp = memory.k_warp_of(late_warp());
    const int row = thread & (block_rows - 1);
    const int n = first_row(gemm.weight, plan, row_tile, row / kWarpRows) + row % kWarpRows;
    const bool is_ours =
        n >= (row_tile * plan.row_warps + row / kWarpRows) * kWarpRows;  // no earlier warp's row
    const int rows = min(static_cast<int>(gemm.M) - share.first_m, Shape::kRows);
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; tile++) {
      if (tile * kMmaColumns >= rows) return;
      TileSums part;
#pragma unroll
      for (int i = 0; i < kWarpTiles * 4; i++)
        part.values[i / 4][0][i % 4] = segments.sums.values[i / 4][tile][i % 4];
      __syncthreads();
      part.store(Memory::sums(), k_warp, row_warp, block_rows, late_lane());
      __syncthreads();
      for (int m = thread / block_rows; is_ours && m < min(kMmaColumns, rows - tile * kMmaColumns);
           m += Shape::kThreads / block_rows) {
        const float sum = TileSums::add(Memory::sums(), plan.k_warps, m, row, block_rows) * factor;
        const int64_t at = share.first_m + tile * kMmaColumns + m;
        if (plan.split.splits == 1) {
          store_output(gemm, at, n, sum);
        } else {
          plan.split.partials[(share.part * gemm.M + at) * gemm.weight.N + n] = sum;
        }
      }
    }
  }

  Sums segments;
};

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    gemm_4bit_staged_kernel(Gemm4bit<T> gemm, Codebook4bit codebook, StagedPlan plan) {
  using Memory = StagedMemory<T, Shape>;
  const WeightView& weight = gemm.weight;
  const Memory memory(plan);

  const StagedShare share(weight, plan, Shape::kRows, plan.k_warps * Shape::kSpan);
  StagedPlace<Shape> next(plan, share);
  StagedPlace<Shape> copied = next;
  const auto copy_next = [&](int stage) {
    if (copied.is_valid(plan)) {
      memory.copy(gemm, copied, share.first_m, stage);
      copied.advance(plan, share);
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < Shape::kStages - 1; stage++) copy_next(stage);
  StagedWeightScales<Shape> scales;
  scales.load(weight, plan.block_step, first_row(weight, plan, next.row_tile(), memory.row_warp()),
              next.column(memory.k_warp()));

  const PairTable<T> table(Memory::table());
  table.template fill<Shape::kThreads>(codebook, codebook.factor.of_codes);
  if (const float* const nested = weight.scales.nested_code()) {
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += Shape::kThreads)
      Memory::nested_code()[i] = nested[i];
  }
  __syncthreads();
  struct None {
    __device__ explicit None(const PairTable<T>&) {}
    __device__ void of_half(uint32_t, int, uint32_t (&)[2]) const {}
  };
  const std::conditional_t<(Shape::kPermuted > 0), PermutedCodes<T>, None> permuted(table);

  int stage = 0;
#pragma unroll 1
  while (next.is_valid(plan)) {
    const int row_tile = next.row_tile();
    StagedTile<T, Shape> tile;
#pragma unroll 1
    do {
      wait_for_copies<Shape::kStages - 2>();
      if (plan.row_warps == 1)
        sync_warp();
      else
        __syncthreads();
      copy_next(stage == 0 ? Shape::kStages - 1 : stage - 1);  // in place of the step before
      const bool is_inside = next.column(memory.k_warp()) < weight.K;
      scales.decode(weight, Memory::nested_code());
      next.advance(plan, share);
      if (next.is_valid(plan))
        scales.load(weight, plan.block_step, first_row(weight, plan, next.row_tile(), memory.row_warp()),
                    next.column(memory.k_warp()));
      if (is_inside) tile.add(memory, stage, scales, table, permuted);
      stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    } while (next.row_tile() == row_tile);
    tile.store(gemm, plan, share, row_tile, codebook.factor.of_sums);
  }
}

// In shared memory, of a block.
template <class Shape>
int staged_bytes(int k_warps, int x_rows) {
  return Shape::kFixedBytes +
         Shape::kStages * (Shape::kWarps * Shape::kCodeBytes + k_warps * x_rows * Shape::kXBytes);
}

// Warps share rows of W, rather than parts of K, until reading X for a block costs half of what the weight
// does, as far as that leaves enough blocks to fill the chip; and where the stages would not fit otherwise.
// No warps: they do not fit at all.
template <class Shape>
StagedPlan staged_plan(int64_t M, int64_t N, int64_t K) {
  constexpr int kRowsPerRowOfX = 8;
  constexpr int64_t kFewestSteps = 1;
  constexpr int kReservedBytes = 1024;  // of each block, by the driver
  const DeviceLimits limits = device_limits();
  StagedPlan plan = {};
  plan.x_rows = Shape::kTiles == 1 ? static_cast<int>(std::min<int64_t>(M, Shape::kRows)) : Shape::kRows;
  plan.blocks = Shape::kBlocks;
  const auto fits = [&](int row_warps) {
    return staged_bytes<Shape>(Shape::kWarps / row_warps, plan.x_rows) <=
           std::min(limits.shared_bytes_of_block,
                    limits.shared_bytes_of_multiprocessor / plan.blocks - kReservedBytes);
  };
  while (plan.blocks > 1 && !fits(Shape::kWarps)) plan.blocks--;
  if (!fits(Shape::kWarps)) return plan;
  int row_warps = 1;
  while (!fits(row_warps)) row_warps *= 2;
  const int64_t m_tiles = ceil_div(M, Shape::kRows);
  const auto row_tiles = [&](int row_warps) { return ceil_div(N, row_warps * kWarpRows); };
  while (row_warps < Shape::kWarps &&
         row_warps * kWarpRows < kRowsPerRowOfX * std::min<int64_t>(M, Shape::kRows) &&
         row_tiles(2 * row_warps) * m_tiles * 4 >= limits.multiprocessors * 3)
    row_warps *= 2;

  plan.row_warps = row_warps;
  plan.row_warps_shift = log2_of(row_warps);
  plan.k_warps = Shape::kWarps / row_warps;
  plan.m_tiles = static_cast<int>(m_tiles);
  plan.row_tiles = static_cast<int>(row_tiles(row_warps));
  const int64_t tiles = int64_t{plan.row_tiles} * plan.m_tiles;
  plan.split = split_k(tiles, ceil_div(K, plan.k_warps * Shape::kSpan), kFewestSteps, plan.blocks);
  const bool goes_on = plan.m_tiles == 1 && plan.split.splits == 1;
  const int places = limits.multiprocessors * plan.blocks;
  plan.row_tile_step = goes_on ? std::min(plan.row_tiles, places) : plan.row_tiles;
  return plan;
}

template <class T, class Shape>
bool fits_staged(const Gemm4bit<T>& gemm) {
  const WeightView& weight = gemm.weight;
  return mma_segment(gemm) == kStagedSegment && is_aligned(weight.packed, kAccessBytes) &&
         weight.block_shift <= kMostStagedBlockShift &&
         (weight.N * weight.K >> weight.block_shift) < kMostMmaColumns && gemm.M <= kMostMmaColumns &&
         weight.N <= kMostMmaColumns &&
         ceil_div(gemm.M, Shape::kRows) * ceil_div(weight.N, kWarpRows) <= kMostMmaColumns &&
         staged_plan<Shape>(gemm.M, weight.N, weight.K).row_warps > 0;
}

template <class T, class Shape>
void launch_gemm_4bit_staged(const Gemm4bit<T>& gemm, const Codebook4bit& codebook, Stream stream) {
  StagedPlan plan = staged_plan<Shape>(gemm.M, gemm.weight.N, gemm.weight.K);
  plan.block_step = static_cast<int>(gemm.weight.K * 8 >> gemm.weight.block_shift);
  const int64_t blocks = int64_t{plan.row_tile_step} * plan.m_tiles * plan.split.splits;
  multiply_in_splits(gemm, plan.split, stream, [&](const SplitK& with_memory) {
    plan.split = with_memory;
    launch("gemm_4bit", gemm_4bit_staged_kernel<T, Shape>, blocks, Shape::kThreads, stream,
           staged_bytes<Shape>(plan.k_warps, plan.x_rows), gemm, codebook, plan);
  });
}

}  // namespace bnb
