// What the CPU's kernel module has besides the kernels: its threads and its instruction sets.
#include <pybind11/stl.h>

#include <functional>
#include <vector>

#include "../csrc_shared/bind.h"
#include "dispatch.h"
#include "threads.h"

namespace bnb {
namespace {

// Of a gradient, for which torch's matmul does not make up for writing the whole weight down.
constexpr int64_t kFewRows = 16;

bool gemm_4bit_backward(const void* dY, DType dtype, int64_t M, int64_t N, int64_t K, const uint8_t* packed,
                        const float* absmax, const uint8_t* codes, const float* nested_absmax,
                        const float* nested_code, const float* offset, int64_t nested_blocksize,
                        int64_t blocksize, QuantType quant_type, void* dA) {
  const BlockScales scales{absmax, codes, nested_absmax, nested_code, offset, nested_blocksize};
  const TileBackward on_tiles = backward_on_tiles();
  if (on_tiles && on_tiles(dY, dtype, M, N, K, packed, scales, blocksize, quant_type, dA)) return true;
  if (M > kFewRows && N >= kLeastTerms && multiplies(dtype)) return false;
  backward()(dY, dtype, M, N, K, packed, scales, blocksize, quant_type, dA);
  return true;
}

// Tensors of so many elements keep all threads busy by themselves.
constexpr int64_t kLarge = 1 << 16;
// The least work for a thread, in elements.
constexpr int64_t kLeast = 1 << 13;

}  // namespace

// Small tensors in one parallel region, each by one thread; large ones in turn, each by all threads.
void for_each_tensor(const std::vector<int64_t>& counts, const std::function<void(size_t)>& body) {
  std::vector<size_t> small;
  int64_t elements = 0;
  for (size_t i = 0; i < counts.size(); i++) {
    if (counts[i] >= kLarge) {
      body(i);
    } else {
      small.push_back(i);
      elements += counts[i];
    }
  }
  struct Context {
    const std::vector<size_t>& small;
    const std::function<void(size_t)>& body;
  } context{small, body};
  const auto size = static_cast<int64_t>(small.size());
  const int64_t grain = elements > 0 ? (kLeast * size + elements - 1) / elements : size;
  parallel_range(
      size, grain,
      [](void* given, int64_t begin, int64_t end) {
        const auto& [indices, call] = *static_cast<const Context*>(given);
        for (int64_t i = begin; i < end; i++) call(indices[i]);
      },
      &context);
}

void bind_extras(pybind11::module_& m) {
  choose_isa();
  m.def("set_openmp", &set_openmp, pybind11::arg("libtorch_cpu_path"),
        "Run on the OpenMP runtime that this library uses; RuntimeError where it has none.");
  m.def("openmp_path", &openmp_path, "The file of that runtime, None before set_openmp.");
  bind<&gemm_4bit_backward>(
      m, "gemm_4bit_backward",
      "dA = dY @ dequantized(packed) in one, with the arguments of gemm_4bit but for the bias; False, and "
      "nothing done, where torch's dense matmul in dY's half precision is faster.");
  m.def("isas_built", &isas_built, "Names of the instruction sets in this build, ascending.");
  m.def("isas_available", &isas_available, "Those that this machine can run.");
  m.def("isa", &isa, "The instruction set that serves.");
  m.def("set_isa", &set_isa, pybind11::arg("name"), "Choose it; ValueError for a name not available.");
}

}  // namespace bnb
