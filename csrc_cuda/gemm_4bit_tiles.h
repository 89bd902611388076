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
  const LaneCodebook codebook = make_lane_codebook(codes, codebook_values);
  const WeightView& weight = gemm.weight;
  const bool whole = has_whole_chunks(gemm);
  const auto fill = [&](int64_t m, int64_t n, int64_t k, float(&x)[kChunk], float(&w)[kChunk]) {
    if (k >= weight.K) return;
    if (m < gemm.M) load_floats(gemm.A + m * weight.K + k, whole, weight.K - k, x);
    if (n < weight.N) Weights::decode(weight, codebook, n, k, w);
  };
  multiply_by_tiles(gemm.M, weight.N, weight.K, fill,
                    [&](int64_t m, int64_t n, float sum) { store_output(gemm, m, n, sum); });
}

template <class Weights, class T>
void launch_gemm_4bit_tiles(const Gemm4bit<T>& gemm, const Codebook4bit& codes, Stream stream) {
  launch("gemm_4bit_tiles", gemm_4bit_tiles_kernel<Weights, T>,
         ceil_div(gemm.weight.N, kTile) * ceil_div(gemm.M, kTile), kTileThreads, stream, 0, gemm, codes);
}

}  // namespace bnb
