// Products with a 4-bit weight for each group of rows (docs/SPEC.md section 3): on tensor cores where the
// kernel for one weight takes it, else in f32. The host does not know how many rows a group has: there are as
// many blocks as it could take, and those without a tile end at once.
#include "gemm_4bit_mma.h"
#include "gemv_4bit.h"
#include "groups.h"
#include "operations.h"
#include "tiles.h"

namespace bnb {
namespace {

// out[m] = A[m] @ weights[e]^T + bias[e]; the stacked weights are one weight of E * N rows.
template <class T>
struct GroupedGemm4bit {
  Gemm4bit<T> stacked;
  Groups groups;
  int64_t N;

  // Of the row m of group e.
  __device__ void store(int64_t e, int64_t m, int64_t n, float sum) const {
    if (stacked.bias) sum += to_float(stacked.bias[e * N + n]);
    stacked.out[m * N + n] = from_float<T>(sum);
  }
};

constexpr int kGroupedSegment = 64;  // codes of a row that lie in one block
constexpr int kFewRows = 4;          // that a warp takes at a time
constexpr int kGemvBlockColumns = kGemvThreads / kWarp * kGemvColumns;

template <class Weights, class T>
__global__ void __launch_bounds__(kGemvThreads, 4)
    grouped_gemv_4bit_kernel(GroupedGemm4bit<T> gemm, Codebook4bit codes, int64_t tiles) {
  __shared__ float shared[kLaneCodebookSize];
  const LaneCodebook codebook = make_lane_codebook(codes, shared);
  __syncthreads();
  const WeightView& weight = gemm.stacked.weight;
  const bool whole = has_whole_chunks(gemm.stacked);
  const int64_t column_blocks = ceil_div(gemm.N, kGemvBlockColumns);
  for (int64_t block = blockIdx.x; block < tiles * column_blocks; block += gridDim.x) {
    const GroupTile tile = group_tile(gemm.groups, gemm.stacked.M, block / column_blocks, kFewRows);
    const int64_t n = (block % column_blocks * (kGemvThreads / kWarp) + warp()) * kGemvColumns;
    if (tile.rows == 0 || n >= gemm.N) continue;
    const int64_t first = tile.group * gemm.N;
    gemv_4bit_rows<Weights, kFewRows>(
        gemm.stacked.A + tile.first * weight.K, static_cast<int>(tile.rows), weight, codebook, first + n,
        static_cast<int>(min(gemm.N - n, static_cast<int64_t>(kGemvColumns))), whole,
        [&](int r, int64_t row, float sum) { gemm.store(tile.group, tile.first + r, row - first, sum); });
  }
}

template <class Weights, class T>
__global__ void __launch_bounds__(kTileThreads, 2)
    grouped_gemm_4bit_tiles_kernel(GroupedGemm4bit<T> gemm, Codebook4bit codes, int64_t tiles) {
  __shared__ float codebook_values[kLaneCodebookSize];
  const LaneCodebook codebook = make_lane_codebook(codes, codebook_values);
  const WeightView& weight = gemm.stacked.weight;
  const bool whole = has_whole_chunks(gemm.stacked);
  const int64_t column_blocks = ceil_div(gemm.N, kTile);
  for (int64_t block = blockIdx.x; block < tiles * column_blocks; block += gridDim.x) {
    const GroupTile tile = group_tile(gemm.groups, gemm.stacked.M, block / column_blocks, kTile);
    if (tile.rows == 0) continue;
    const int64_t first_n = block % column_blocks * kTile;
    const int64_t row = filled_row(), n = first_n + row;
    const auto fill = [&](int64_t at, Tile& x_tile, Tile& w_tile) {
      const int64_t k = at + filled_depth();
      float x[kChunk] = {}, w[kChunk] = {};
      if (k < weight.K && row < tile.rows)
        load_floats(gemm.stacked.A + (tile.first + row) * weight.K + k, whole, weight.K - k, x);
      if (k < weight.K && n < gemm.N) Weights::decode(weight, codebook, tile.group * gemm.N + n, k, w);
      store_row(x_tile, filled_row(), filled_depth(), x);
      store_row(w_tile, filled_row(), filled_depth(), w);
    };
    multiply_tile(weight.K, fill, [&](int m, int column, float sum) {
      if (m < tile.rows && first_n + column < gemm.N)
        gemm.store(tile.group, tile.first + m, first_n + column, sum);
    });
  }
}

template <class T, int n_tiles, class Segments>
__global__ void __launch_bounds__(kMmaThreads, n_tiles <= kMostTilesForTwoBlocks ? 2 : 1)
    grouped_gemm_4bit_mma_kernel(GroupedGemm4bit<T> gemm, Codebook4bit codebook, MmaPlan plan) {
  const WeightView& weight = gemm.stacked.weight;
  const int block = static_cast<int>(blockIdx.x);
  const GroupTile tile =
      group_tile(gemm.groups, gemm.stacked.M, block / plan.row_blocks, MmaTile<T, n_tiles, Segments>::kRows);
  if (tile.rows == 0) return;
  const int64_t first = tile.group * gemm.N;
  const MmaPlace<T> place{gemm.stacked.A + tile.first * weight.K, static_cast<int>(tile.rows),
                          first + int64_t{block % plan.row_blocks} * plan.row_warps * kWarpRows,
                          first + gemm.N, 0};
  multiply_mma_block<T, n_tiles, Segments>(weight, codebook, plan, place, [&](int m, int64_t n, float sum) {
    gemm.store(tile.group, tile.first + m, n - first, sum);
  });
}

// dA[m] = dY[m] @ weights[e].
template <class T>
struct GroupedBackward4bit {
  const T* dY;
  WeightView stacked;
  Groups groups;
  int64_t N;
  T* dA;
  int64_t rows;
};

template <class Weights, class T>
__global__ void __launch_bounds__(kTileThreads, 2)
    grouped_backward_4bit_kernel(GroupedBackward4bit<T> product, Codebook4bit codes, int64_t tiles) {
  __shared__ float codebook_values[kLaneCodebookSize];
  const LaneCodebook codebook = make_lane_codebook(codes, codebook_values);
  const WeightView& weight = product.stacked;
  const int64_t N = product.N, K = weight.K, column_blocks = ceil_div(K, kTile);
  constexpr int kRowChunks = kTile / kChunk;  // of a row of W in a tile
  for (int64_t block = blockIdx.x; block < tiles * column_blocks; block += gridDim.x) {
    const GroupTile tile = group_tile(product.groups, product.rows, block / column_blocks, kTile);
    if (tile.rows == 0) continue;
    const int64_t first_k = block % column_blocks * kTile;
    const auto fill = [&](int64_t at, Tile& y_tile, Tile& w_tile) {
      const int64_t n = at + filled_depth();
      float y[kChunk] = {}, w[kChunk] = {};
      if (n < N && filled_row() < tile.rows)
        load_floats(product.dY + (tile.first + filled_row()) * N + n, N - n, y);
      store_row(y_tile, filled_row(), filled_depth(), y);
      const int row = static_cast<int>(threadIdx.x) / kRowChunks;
      const int column = static_cast<int>(threadIdx.x) % kRowChunks * kChunk;
      if (at + row < N && first_k + column < K)
        Weights::decode(weight, codebook, tile.group * N + at + row, first_k + column, w);
#pragma unroll
      for (int i = 0; i < kChunk; i++) w_tile.values[row][column + i] = w[i];
    };
    multiply_tile(N, fill, [&](int m, int column, float sum) {
      if (m < tile.rows && first_k + column < K)
        product.dA[(tile.first + m) * K + first_k + column] = from_float<T>(sum);
    });
  }
}

static_assert(kFilled == kChunk && kTileThreads == kTileDepth * (kTile / kChunk));

// Calls f with the way in which the weights are read.
template <class F>
void with_weights(const WeightView& weight, const F& f) {
  AlignedWeight::fits(weight) ? f(AlignedWeight()) : f(AnyWeight());
}

// In f32.
template <class T>
void launch_grouped_f32(const GroupedGemm4bit<T>& gemm, const Codebook4bit& codebook, Stream stream) {
  const int64_t rows = gemm.stacked.M;
  with_weights(gemm.stacked.weight, [&](auto kind) {
    using Weights = decltype(kind);
    if (rows <= kFewRows * gemm.groups.count) {
      const int64_t tiles = most_group_tiles(gemm.groups, rows, kFewRows);
      launch("grouped_gemm_4bit", grouped_gemv_4bit_kernel<Weights, T>,
             tiles * ceil_div(gemm.N, kGemvBlockColumns), kGemvThreads, stream, 0, gemm, codebook, tiles);
    } else {
      const int64_t tiles = most_group_tiles(gemm.groups, rows, kTile);
      launch("grouped_gemm_4bit", grouped_gemm_4bit_tiles_kernel<Weights, T>, tiles * ceil_div(gemm.N, kTile),
             kTileThreads, stream, 0, gemm, codebook, tiles);
    }
  });
}

// On tensor cores, in blocks of n_tiles * 8 rows of one group; K is not split.
template <class T, int n_tiles>
void launch_grouped_mma(const GroupedGemm4bit<T>& gemm, const Codebook4bit& codebook, Stream stream) {
  using Parts = Segments<kGroupedSegment, n_tiles == 8 ? 1 : 2>;
  using Tile = MmaTile<T, n_tiles, Parts>;
  const int64_t K = gemm.stacked.weight.K;
  MmaPlan plan = mma_plan<Tile, Parts>(Tile::kRows, gemm.N, K);
  plan.split = {1, static_cast<int>(ceil_div(K, plan.k_warps * Parts::span)), nullptr};
  const size_t shared = std::max<size_t>(PairTable<T>::kBytes + 2 * plan.k_warps * Tile::X::kBytes,
                                         MmaSums<float, n_tiles>::kBytes);
  const int64_t tiles = most_group_tiles(gemm.groups, gemm.stacked.M, Tile::kRows);
  launch("grouped_gemm_4bit", grouped_gemm_4bit_mma_kernel<T, n_tiles, Parts>, tiles * plan.row_blocks,
         kMmaThreads, stream, shared, gemm, codebook, plan);
}

template <class T>
bool fits_grouped_mma(const GroupedGemm4bit<T>& gemm) {
  if constexpr (kMayHaveMma && !std::is_same_v<T, float>)
    return gemm.N >= kWarpRows && mma_segment(gemm.stacked) == kGroupedSegment &&
           most_group_tiles(gemm.groups, gemm.stacked.M, kMmaColumns) * ceil_div(gemm.N, kWarpRows) <=
               kMaxGrid;
  return false;
}

}  // namespace

namespace gpu {

bool grouped_gemm_4bit(const Matrix& A, const Weight4bit& weights, const Groups& groups, const void* bias,
                       void* out, Stream stream) {
  with_gemm_4bit(A, weights, bias, out, [&](const auto& stacked) {
    using T = typename std::decay_t<decltype(stacked)>::Element;
    const GroupedGemm4bit<T> gemm{stacked, groups, weights.N / groups.count};
    const Codebook4bit codebook = codebook_for<T>(weights.format());
    if constexpr (kMayHaveMma && !std::is_same_v<T, float>) {
      if (fits_grouped_mma(gemm)) {
        // Of a few tokens an expert has one or two; of many so many that higher tiles, which read the weight
        // less often, are full.
        const bool few = ceil_div(A.rows, groups.count) <= kMmaColumns;
        return few ? launch_grouped_mma<T, 1>(gemm, codebook, stream)
                   : launch_grouped_mma<T, 8>(gemm, codebook, stream);
      }
    }
    launch_grouped_f32(gemm, codebook, stream);
  });
  return true;
}

bool grouped_gemm_4bit_backward(const Matrix& dY, const Weight4bit& weights, const Groups& groups, void* dA,
                                Stream stream) {
  const int64_t tiles = most_group_tiles(groups, dY.rows, kTile);
  with_dtype(dY.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const GroupedBackward4bit<T> product{dY.as<const T>(),         WeightView(weights), groups,
                                         weights.N / groups.count, static_cast<T*>(dA), dY.rows};
    with_weights(product.stacked, [&](auto kind) {
      launch("grouped_gemm_4bit_backward", grouped_backward_4bit_kernel<decltype(kind), T>,
             tiles * ceil_div(weights.K, kTile), kTileThreads, stream, 0, product,
             codebook_for<T>(weights.format()), tiles);
    });
  });
  return true;
}

}  // namespace gpu
}  // namespace bnb
