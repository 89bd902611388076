// Products whose depth several blocks share: each leaves its part of the sums, and a second kernel adds them.
#pragma once

#include "device_limits.h"
#include "gemm_4bit.h"
#include "workspace.h"

namespace bnb {

struct SplitK {
  int splits, steps_per_split;
  float* partials;  // [splits][M][N], null where splits is 1
};

constexpr int kAddPartialsThreads = 256;

template <class T>
__global__ void __launch_bounds__(kAddPartialsThreads)
    add_partials_kernel(Gemm4bit<T> gemm, const float* partials, int splits) {
  const int64_t size = gemm.M * gemm.weight.N;
  const int64_t threads = int64_t{gridDim.x} * kAddPartialsThreads;
  for (int64_t i = int64_t{blockIdx.x} * kAddPartialsThreads + threadIdx.x; i < size; i += threads) {
    float sum = 0.0f;
    for (int64_t split = 0; split < splits; split++) sum += partials[split * size + i];
    store_output(gemm, i / gemm.weight.N, i % gemm.weight.N, sum);
  }
}

// Splits that fill the chip, which `blocks` without them do not, of `fewest_steps` or more: with fewer the
// second kernel costs more than they save. A multiprocessor has place for some blocks at once.
inline SplitK split_k(int64_t blocks, int64_t steps, int64_t fewest_steps, int places = 1) {
  const int64_t wanted = std::min(places * device_limits().multiprocessors / blocks, steps / fewest_steps);
  SplitK split = {};
  split.steps_per_split = static_cast<int>(ceil_div(steps, std::max<int64_t>(1, wanted)));
  split.splits = static_cast<int>(ceil_div(steps, split.steps_per_split));
  return split;
}

// Calls multiply(split) with the memory for the partial sums, and adds them.
template <class T, class Multiply>
void multiply_in_splits(const Gemm4bit<T>& gemm, SplitK split, Stream stream, const Multiply& multiply) {
  const int64_t size = gemm.M * gemm.weight.N;
  const Workspace partials(split.splits > 1 ? split.splits * size * sizeof(float) : 0, stream);
  split.partials = partials.as<float>();
  multiply(split);
  if (split.splits > 1)
    launch("gemm_4bit_add_partials", add_partials_kernel<T>, ceil_div(size, kAddPartialsThreads),
           kAddPartialsThreads, stream, 0, gemm, split.partials, split.splits);
}

}  // namespace bnb
