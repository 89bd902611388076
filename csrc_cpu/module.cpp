// What the CPU's kernel module has besides the kernels: its threads and its instruction sets.
#include <pybind11/stl.h>

#include "../csrc_shared/bind.h"
#include "dispatch.h"
#include "threads.h"

namespace bnb {
namespace {

bool gemm_4bit_backward(const void* dY, DType dtype, int64_t M, int64_t N, int64_t K, const uint8_t* packed,
                        const float* absmax, const uint8_t* codes, const float* nested_absmax,
                        const float* nested_code, const float* offset, int64_t nested_blocksize,
                        int64_t blocksize, QuantType quant_type, void* dA) {
  const FusedBackward fused = fused_gemm_4bit_backward();
  const BlockScales scales{absmax, codes, nested_absmax, nested_code, offset, nested_blocksize};
  return fused && fused(dY, dtype, M, N, K, packed, scales, blocksize, quant_type, dA);
}

}  // namespace

void bind_extras(pybind11::module_& m) {
  choose_isa();
  m.def("set_openmp", &set_openmp, pybind11::arg("libtorch_cpu_path"),
        "Run on the OpenMP runtime that this library uses; RuntimeError where it has none.");
  m.def("openmp_path", &openmp_path, "The file of that runtime, None before set_openmp.");
  bind<&gemm_4bit_backward>(
      m, "gemm_4bit_backward",
      "dA = dY @ dequantized(packed) in one, with the arguments of gemm_4bit but for the bias; False, and "
      "nothing done, where the instruction set that serves has no kernel for them.");
  m.def("isas_built", &isas_built, "Names of the instruction sets in this build, ascending.");
  m.def("isas_available", &isas_available, "Those that this machine can run.");
  m.def("isa", &isa, "The instruction set that serves.");
  m.def("set_isa", &set_isa, pybind11::arg("name"), "Choose it; ValueError for a name not available.");
}

}  // namespace bnb
