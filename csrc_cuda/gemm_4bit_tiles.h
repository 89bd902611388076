// Products of many rows with a 4-bit weight by plain multiply-adds in f32: any type, any shape, any address.
//
// A block decodes a tile of the weight into shared memory beside a tile of X, and each thread keeps 4 x 4
// sums in registers.
#pragma once

#include "gemm_4bit.h"
#include "tiles.h"

namespace bnb {

template <class Weights, class T>
__global__ void __launch_bounds__(kTileThreads, 2)
    gemm_4bit_tiles_kernel(Gemm4bit<T> gemm, Codebook4bit codes) {
  __shared__ float codebook_values[kLaneCodebookSize];
  __shared__ Tile x_tile, w_tile;
  const LaneCodebook codebook = make_lane_codebook(codes, codebook_values);
  const Weight4bit& weight = gemm.weight;
  const int64_t column_blocks = ceil_div(weight.N, kTile), blocks = column_blocks * ceil_div(gemm.M, kTile);
  const bool whole = has_whole_chunks(gemm);
  const int thread = static_cast<int>(threadIdx.x);
  const int filled_row = thread / (kTileDepth / kChunk), filled_k = thread % (kTileDepth / kChunk) * kChunk;
  const int row = row_of_thread(), column = column_of_thread();

  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t first_m = block / column_blocks * kTile, first_n = block % column_blocks * kTile;
    float sums[kThreadTile][kThreadTile] = {};
    for (int64_t k = 0; k < weight.K; k += kTileDepth) {
      __syncthreads();
      float x[kChunk] = {}, w[kChunk] = {};
      const int64_t at = k + filled_k;
      if (at < weight.K && first_m + filled_row < gemm.M)
        load_floats(gemm.A + (first_m + filled_row) * weight.K + at, whole, weight.K - at, x);
      if (at < weight.K && first_n + filled_row < weight.N)
        Weights::decode(weight, codebook, first_n + filled_row, at, w);
      store_row(x_tile, filled_row, filled_k, x);
      store_row(w_tile, filled_row, filled_k, w);
      __syncthreads();
      multiply_tiles(x_tile, w_tile, row, column, sums);
    }
#pragma unroll
    for (int r = 0; r < kThreadTile; r++) {
#pragma unroll
      for (int c = 0; c < kThreadTile; c++) {
        const int64_t m = first_m + row + r, n = first_n + column + c;
        if (m < gemm.M && n < weight.N) store_output(gemm, m, n, sums[r][c]);
      }
    }
  }
}

template <class Weights, class T>
void launch_gemm_4bit_tiles(const Gemm4bit<T>& gemm, QuantType quant_type, Stream stream) {
  launch("gemm_4bit_tiles", gemm_4bit_tiles_kernel<Weights, T>,
         ceil_div(gemm.weight.N, kTile) * ceil_div(gemm.M, kTile), kTileThreads, stream, 0, gemm,
         codebook_4bit(quant_type));
}

}  // namespace bnb
