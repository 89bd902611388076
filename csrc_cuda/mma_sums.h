// The sums of a warp over 32 rows of its row operand and up to 64 columns, and how the warps of a block that
// split K add theirs up.
#pragma once

#include "mma.h"

namespace bnb {

constexpr int kMmaThreads = 256;
constexpr int kMmaWarps = kMmaThreads / kWarp;
constexpr int kWarpRows = 32;
constexpr int kWarpTiles = kWarpRows / kMmaRows;

template <class C, int n_tiles>
struct MmaSums {
  static constexpr int kColumns = n_tiles * kMmaColumns;
  static constexpr size_t kBytes = sizeof(C) * kMmaWarps * kWarpRows * kColumns;  // in shared memory

  C values[kWarpTiles][n_tiles][4];

  // To shared[k_warp][column][row of the block].
  __device__ void store(C* shared, int k_warp, int row_warp, int block_rows, int lane = bnb::lane()) const {
    const int g = lane / kQuad, t = lane % kQuad;
#pragma unroll
    for (int tile = 0; tile < n_tiles; tile++) {
#pragma unroll
      for (int i = 0; i < kWarpTiles * 4; i++) {
        const int column = tile * kMmaColumns + 2 * t + i % 2;
        const int row = row_warp * kWarpRows + i / 2 * 8 + g;
        shared[place(k_warp, column, row, block_rows)] = values[i / 4][tile][i % 4];
      }
    }
  }

  // What all warps have for one element, in their order.
  __device__ static C add(const C* shared, int k_warps, int column, int row, int block_rows) {
    C sum = 0;
    for (int w = 0; w < k_warps; w++) sum += shared[place(w, column, row, block_rows)];
    return sum;
  }

 private:
  // The columns of a quad's lanes are shifted apart, so that they meet in no bank.
  __device__ static int place(int k_warp, int column, int row, int block_rows) {
    return (k_warp * kColumns + column) * block_rows + (row ^ column / 2 % kQuad * 8);
  }
};

}  // namespace bnb
