// What a warp adds up of the products of its rows of a 4-bit weight with rows of X, on tensor cores.
//
// Rows of the weight are the rows of the mma, rows of X its columns. A lane holds a quarter of a segment of
// rows g + 8r of W, for r from 0 to 3, and of rows g + 8i of X; a segment lies in one block of scales, which
// are applied in f32 to the sums over it.
#pragma once

#include "mma_sums.h"

namespace bnb {

template <class T, int n_tiles, int length>
class SegmentSums {
 public:
  static constexpr int kSteps = length / 16;  // mma steps of a segment
  using Piece = Pack<uint32_t, 4>;            // of X
  using Operand = uint32_t[kWarpTiles][kSteps][4];

  // The place of the pair from a byte of row g + 8r.
  __device__ static uint32_t& pair(Operand& w, int r, int byte) {
    return w[r / 2][byte / 2][byte % 2 * 2 + r % 2];
  }

  // Adds the products with all rows of X; read(tile, i) gives the lane's i-th piece of rows 8 * tile and on.
  template <class Read>
  __device__ void add(const Operand& w, const float (&scales)[4], const Read& read) {
#pragma unroll
    for (int tile = 0; tile < n_tiles; tile++) {
      uint32_t x[kSteps][2];
#pragma unroll
      for (int i = 0; i < kSteps / 2; i++) {
        const Piece piece = read(tile, i);
#pragma unroll
        for (int j = 0; j < 4; j++) x[2 * i + j / 2][j % 2] = piece[j];
      }
#pragma unroll
      for (int i = 0; i < kWarpTiles; i++) {
        float c[4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; step++) mma_16x8x16<T>(c, w[i][step], x[step]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float& sum = sums.values[i][tile][j];
          sum = fmaf(scales[2 * i + j / 2], c[j], sum);
        }
      }
    }
  }

  MmaSums<float, n_tiles> sums = {};
};

}  // namespace bnb
