// Products in f32 of tiles that a block keeps in shared memory; each thread keeps 4 x 4 sums in registers.
#pragma once

#include "device.h"

namespace bnb {

constexpr int kTile = 64;       // rows and columns of the result that a block takes
constexpr int kTileDepth = 32;  // what is summed over, in shared memory at a time
constexpr int kThreadTile = 4;  // rows and columns of the result that a thread takes
constexpr int kTileThreads = (kTile / kThreadTile) * (kTile / kThreadTile);

// [depth][rows]; the padding keeps stores along the depth out of each other's banks.
struct __align__(16) Tile {
  float values[kTileDepth][kTile + kThreadTile];
};

using ThreadSums = float[kThreadTile][kThreadTile];

// The first row and column of this thread's sums.
__device__ inline int row_of_thread() {
  return static_cast<int>(threadIdx.x) / (kTile / kThreadTile) * kThreadTile;
}
__device__ inline int column_of_thread() {
  return static_cast<int>(threadIdx.x) % (kTile / kThreadTile) * kThreadTile;
}

template <int count>
__device__ inline void store_row(Tile& tile, int row, int depth, const float (&values)[count]) {
#pragma unroll
  for (int i = 0; i < count; i++) tile.values[depth + i][row] = values[i];
}

// sums += x^T w
__device__ inline void multiply_tiles(const Tile& x, const Tile& w, int row, int column, ThreadSums& sums) {
  using Values = Pack<float, kThreadTile>;
#pragma unroll 8
  for (int i = 0; i < kTileDepth; i++) {
    const auto a = *reinterpret_cast<const Values*>(&x.values[i][row]);
    const auto b = *reinterpret_cast<const Values*>(&w.values[i][column]);
#pragma unroll
    for (int r = 0; r < kThreadTile; r++) {
#pragma unroll
      for (int c = 0; c < kThreadTile; c++) sums[r][c] = fmaf(a[r], b[c], sums[r][c]);
    }
  }
}

constexpr int kFilled =
    kTile * kTileDepth / kTileThreads;  // neighbours along the depth that a thread fills in

// A tile of the result, over `depth` entries; every thread of the block calls it.
//
// fill(at, x, w) sets the tiles for the entries from `at` on; store(row, column, sum) takes an entry.
template <class Fill, class Store>
__device__ inline void multiply_tile(int64_t depth, const Fill& fill, const Store& store) {
  __shared__ Tile x_tile, w_tile;
  const int row = row_of_thread(), column = column_of_thread();
  ThreadSums sums = {};
  for (int64_t at = 0; at < depth; at += kTileDepth) {
    __syncthreads();
    fill(at, x_tile, w_tile);
    __syncthreads();
    multiply_tiles(x_tile, w_tile, row, column, sums);
  }
#pragma unroll
  for (int r = 0; r < kThreadTile; r++) {
#pragma unroll
    for (int c = 0; c < kThreadTile; c++) store(row + r, column + c, sums[r][c]);
  }
}

// Where this thread fills a tile: a row, and kFilled neighbours along the depth.
__device__ inline int filled_row() { return static_cast<int>(threadIdx.x) / (kTileDepth / kFilled); }
__device__ inline int filled_depth() {
  return static_cast<int>(threadIdx.x) % (kTileDepth / kFilled) * kFilled;
}

// The result [M, N] of X[M, depth] and W[N, depth], tile by tile; every thread of the block calls it.
//
// fill(m, n, at, x, w) sets what there is of the kFilled entries from `at` on of X's row m and W's row n,
// which may lie outside; store(m, n, sum) takes an entry of the result.
template <class Fill, class Store>
__device__ inline void multiply_by_tiles(int64_t M, int64_t N, int64_t depth, const Fill& fill,
                                         const Store& store) {
  const int64_t column_blocks = ceil_div(N, kTile), blocks = column_blocks * ceil_div(M, kTile);
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t first_m = block / column_blocks * kTile, first_n = block % column_blocks * kTile;
    const auto fill_tiles = [&](int64_t at, Tile& x_tile, Tile& w_tile) {
      float x[kFilled] = {}, w[kFilled] = {};
      fill(first_m + filled_row(), first_n + filled_row(), at + filled_depth(), x, w);
      store_row(x_tile, filled_row(), filled_depth(), x);
      store_row(w_tile, filled_row(), filled_depth(), w);
    };
    multiply_tile(depth, fill_tiles, [&](int row, int column, float sum) {
      const int64_t m = first_m + row, n = first_n + column;
      if (m < M && n < N) store(m, n, sum);
    });
  }
}

}  // namespace bnb
