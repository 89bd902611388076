// How gemm_4bit_staged.h shares out its work, and what a block copies to shared memory: codes and X by
// stages, and scales to registers.
#pragma once

#include "async_copy.h"
#include "gemm_4bit.h"
#include "segment_sums.h"
#include "split_k.h"

namespace bnb {

constexpr int kStagedSegment = 64;
// Eight rows, whose length is a multiple of a segment's, are then a whole number of blocks of scales.
constexpr int kMostStagedBlockShift = 9;

// What is compiled: 8 * tiles rows of X, the warps of a block and the blocks of a multiprocessor, segments
// that a warp takes in a step, steps in shared memory, and of a lane's four pairs of bytes in a segment how
// many are decoded by permutations.
template <int tiles, int warps, int blocks, int segments, int stages, int permuted = 0>
struct StagedShape {
  static constexpr int kTiles = tiles, kWarps = warps, kBlocks = blocks, kSegments = segments;
  static constexpr int kStages = stages, kPermuted = permuted;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kTiles * kMmaColumns;  // of X
  static constexpr int kSpan = kSegments * kStagedSegment;
  static constexpr int kCodeBytes = kWarpRows * kSpan / 2;  // of a warp's step
  static constexpr int kXBytes = kSpan * 2;                 // of a row of X in it
  static constexpr int kNestedBytes = 256 * sizeof(float);
  static constexpr int kSumBytes = kWarps * kWarpRows * kMmaColumns * sizeof(float);  // of 8 rows of X
  static constexpr int kFixedBytes = 256 * 128 + kNestedBytes + kSumBytes;
};

// How the work is shared out: blocks take rows of W, rows of X and a part of K. Where all rows of X and all
// of K are one block's, it goes on to further rows of W.
struct StagedPlan {
  int row_warps, k_warps;  // their product is the warps of a block
  int row_warps_shift;
  int x_rows;  // of X that a stage has place for
  int blocks;  // of a multiprocessor
  int row_tiles, m_tiles;
  int row_tile_step;  // from one row tile of a block to the next one
  int block_step;     // from a block of scales to the one 8 rows further on
  SplitK split;
};

// What stays the same for a block: its rows of X, and its part of K.
struct StagedShare {
  int first_m, part, begin, end;

  __device__ StagedShare(const WeightView& weight, const StagedPlan& plan, int rows, int width)
      : first_m(static_cast<int>(blockIdx.x) % plan.m_tiles * rows),
        part(static_cast<int>(blockIdx.x) / plan.m_tiles / plan.row_tiles),
        begin(part * plan.split.steps_per_split * width),
        end(min(begin + plan.split.steps_per_split * width, static_cast<int>(weight.K))) {}
};

// One step after the other of one row tile after the other.
template <class Shape>
class StagedPlace {
 public:
  __device__ StagedPlace(const StagedPlan& plan, const StagedShare& share)
      : row_tile_(static_cast<int>(blockIdx.x) / plan.m_tiles % plan.row_tiles), column_(share.begin) {}

  __device__ void advance(const StagedPlan& plan, const StagedShare& share) {
    column_ += plan.k_warps * Shape::kSpan;
    if (column_ < share.end) return;
    column_ = share.begin;
    row_tile_ += plan.row_tile_step;
  }

  __device__ bool is_valid(const StagedPlan& plan) const { return row_tile_ < plan.row_tiles; }
  __device__ int row_tile() const { return row_tile_; }
  __device__ int column(int k_warp) const { return column_ + k_warp * Shape::kSpan; }

 private:
  int row_tile_, column_;
};

// The last warps take rows that others have too, so that none reads past the end.
__device__ inline int first_row(const WeightView& weight, const StagedPlan& plan, int row_tile,
                                int row_warp) {
  return min((row_tile * plan.row_warps + row_warp) * kWarpRows, static_cast<int>(weight.N) - kWarpRows);
}

// The stages, behind what stays: codes of each warp [warps][32 rows][span], X [k_warps][x_rows][span].
template <class T, class Shape>
class StagedMemory {
 public:
  using Piece = Pack<uint32_t, 4>;
  using Codes = Pack<uint32_t, 2>;  // a quarter of a segment

  __device__ explicit StagedMemory(const StagedPlan& plan) : plan_(plan) {}

  // Which of the block's rows of W this warp takes, and which part of K. row_warps is a power of two.
  __device__ int row_warp() const { return row_warp_of(warp()); }
  __device__ int k_warp() const { return k_warp_of(warp()); }
  __device__ int row_warp_of(int warp) const { return warp & (plan_.row_warps - 1); }
  __device__ int k_warp_of(int warp) const { return warp >> plan_.row_warps_shift; }

  __device__ static unsigned char* table() { return dynamic_shared<unsigned char>(); }
  __device__ static float* nested_code() { return reinterpret_cast<float*>(table() + 256 * 128); }
  __device__ static float* sums() { return nested_code() + 256; }

  // Starts to copy this warp's part of a step; zeros where K ends.
  __device__ void copy(const Gemm4bit<T>& gemm, const StagedPlace<Shape>& place, int first_m,
                       int stage) const {
    const auto K = static_cast<int>(gemm.weight.K);
    const int column = place.column(k_warp());
    if (column >= K) return;
    copy_codes(gemm.weight, first_row(gemm.weight, plan_, place.row_tile(), row_warp()), column, K, stage);
    copy_x(gemm, first_m, column, K, stage);
  }

  // The lane's quarter of segment s of row g + 8r of W. Computed for each step, or it takes registers; so do
  // its places in X.
  struct LaneCodes {
    const unsigned char* row;
    int swizzle;

    __device__ Codes read(int s, int r) const {
      return *reinterpret_cast<const Codes*>(row + (s ^ swizzle) * kPairBytes +
                                             r * 8 * Shape::kSegments * kPairBytes);
    }
  };
  __device__ LaneCodes lane_codes(int stage) const {
    const int lane = late_lane(), row = lane / kQuad;
    return {codes_of_warp(stage, late_warp()) + row * Shape::kSegments * kPairBytes + lane % kQuad * 8,
            swizzle_of(row)};
  }

  // The first and the second piece that the lane reads of X; those of other segments and of rows further on
  // lie as far from them for all lanes.
  struct LaneX {
    const unsigned char* pieces[2];

    __device__ Piece read(int s, int tile, int i) const {
      constexpr int kTileBytes = kMmaColumns * Shape::kXBytes, kSegmentBytes = 8 * kPieceBytes;
      return *reinterpret_cast<const Piece*>(pieces[i] + tile * kTileBytes + s * kSegmentBytes);
    }
  };
  __device__ LaneX lane_x(int stage) const {
    const int lane = late_lane();
    // With few rows lanes read the last one in place of what is not there; nobody stores what they make.
    const int row = Shape::kTiles == 1 ? min(lane / kQuad, plan_.x_rows - 1) : lane / kQuad;
    const unsigned char* const x = x_of_warp(stage, late_warp());
    const int piece = lane % kQuad * 2;
    return {{x + place_of_piece(row, piece), x + place_of_piece(row, piece + 1)}};
  }

 private:
  static constexpr int kPieceBytes = 16;
  static constexpr int kPairBytes = 2 * kPieceBytes;  // of codes: a segment of a row

  __device__ unsigned char* stage_of(int stage) const {
    const int bytes = Shape::kWarps * Shape::kCodeBytes + plan_.k_warps * plan_.x_rows * Shape::kXBytes;
    return table() + Shape::kFixedBytes + stage * bytes;
  }
  __device__ unsigned char* codes_of_warp(int stage, int warp) const {
    return stage_of(stage) + warp * Shape::kCodeBytes;
  }
  __device__ unsigned char* x_of_warp(int stage, int warp) const {
    return codes_of_warp(stage, Shape::kWarps) + k_warp_of(warp) * plan_.x_rows * Shape::kXBytes;
  }
  // Segments change places within 128 bytes, so that the lanes of four rows, which read at once, meet in no
  // bank; alike in rows 8 apart.
  __device__ static int swizzle_of(int row) { return row * Shape::kSegments / 4 % Shape::kSegments; }
  __device__ static int place_of_pair(int row, int s) {
    return (row * Shape::kSegments + (s ^ swizzle_of(row))) * kPairBytes;
  }
  // In odd rows neighbouring pieces have changed places, to the same end.
  __device__ static int place_of_piece(int row, int piece) {
    return row * Shape::kXBytes + (piece ^ row % 2) * kPieceBytes;
  }

  __device__ void copy_codes(const WeightView& weight, int first_row, int column, int K, int stage) const {
    constexpr int kPieces = 2 * Shape::kSegments, kRowStep = kWarp / kPieces;
    const int lane = late_lane(), row = lane / kPieces, piece = lane % kPieces;
    const int at = column + piece * 32;
    const bool inside = at < K;
    const uint8_t* from = weight.packed + (int64_t{first_row + row} * weight.K + (inside ? at : 0)) / 2;
    const int64_t row_bytes = computed_late(static_cast<uint32_t>(K)) / 2;
    unsigned char* const to = codes_of_warp(stage, warp());
#pragma unroll
    for (int i = 0; i < kWarpRows / kRowStep; i++) {
      const int place = place_of_pair(row + i * kRowStep, piece / 2) + piece % 2 * kPieceBytes;
      copy_async<Reads::once>(to + place, from, inside);
      from += kRowStep * row_bytes;
    }
  }

  __device__ void copy_x(const Gemm4bit<T>& gemm, int first_m, int column, int K, int stage) const {
    constexpr int kPieces = 8 * Shape::kSegments, kRowStep = kWarp / kPieces;
    const int lane = late_lane(), piece = lane % kPieces;
    const int at = column + piece * 8;
    const bool inside = at < K;
    const int rows = min(static_cast<int>(gemm.M) - first_m, plan_.x_rows);
    int row = row_warp() * kRowStep + lane / kPieces;
    const T* from = gemm.A + int64_t{first_m + row} * gemm.weight.K + (inside ? at : 0);
    const int row_step = plan_.row_warps * kRowStep;
    unsigned char* const to = x_of_warp(stage, warp());
#pragma unroll 1
    for (; row < rows; row += row_step) {
      copy_async(to + place_of_piece(row, piece), from, inside);
      from += int64_t{row_step} * K;
    }
  }

  const StagedPlan& plan_;
};

// The scales of a warp's step: a lane of a quad keeps one segment's, of as many rows as there are segments.
template <class Shape>
class StagedWeightScales {
 public:
  __device__ StagedWeightScales() {
#pragma unroll
    for (int i = 0; i < S; i++) nested_blocks_[i] = -1;
  }

  // Loads those of the segments from the column on, of rows whose blocks lie as far apart as block_step says.
  __device__ void load(const WeightView& weight, int block_step, int first_row, int column) {
    const int lane = late_lane();
    const int segment = column + lane % S * kStagedSegment, K = static_cast<int>(weight.K);
    is_inside_ = segment < K;
    const int row = first_row + lane / kQuad + lane % kQuad / S * S * 8;
    const int64_t at = int64_t{row} * K + min(segment, K - kStagedSegment);
    const auto block = static_cast<int>(at >> weight.block_shift);
#pragma unroll
    for (int i = 0; i < S; i++)
      weight.scales.load_next(block + i * block_step, stored_[i], nested_blocks_[i]);
  }
  __device__ void decode(const WeightView& weight, const float* nested_code) {
    const float offset = weight.scales.offset();
#pragma unroll
    for (int i = 0; i < S; i++)
      decoded_[i] = is_inside_ ? weight.scales.decode(stored_[i], offset, nested_code) : 0.0f;
  }
  // What was decoded for segment s of row g + 8r; every lane of the quad calls it.
  __device__ float of(int s, int r) const { return shuffle_lanes<kQuad>(decoded_[r % S], r / S * S + s); }

 private:
  static constexpr int S = Shape::kSegments;

  float decoded_[S];
  StoredScale stored_[S] = {};
  int nested_blocks_[S];
  bool is_inside_ = false;
};

}  // namespace bnb
