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

}  // namespace bnb
