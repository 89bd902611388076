// What the CPU's kernel module has besides the kernels: its threads and its instruction sets.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatch.h"
#include "threads.h"

namespace bnb {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

bool gemm_4bit_backward(uintptr_t dY, int32_t dtype, int64_t M, int64_t N, int64_t K, uintptr_t packed,
                        uintptr_t absmax, uintptr_t codes, uintptr_t nested_absmax, uintptr_t nested_code,
                        uintptr_t offset, int64_t nested_blocksize, int64_t blocksize, int32_t quant_type,
                        uintptr_t dA) {
  const FusedBackward fused = fused_gemm_4bit_backward();
  const BlockScales scales{pointer<const float>(absmax),        pointer<const uint8_t>(codes),
                           pointer<const float>(nested_absmax), pointer<const float>(nested_code),
                           pointer<const float>(offset),        nested_blocksize};
  return fused &&
         fused(pointer<const void>(dY), static_cast<DType>(dtype), M, N, K, pointer<const uint8_t>(packed),
               scales, blocksize, static_cast<QuantType>(quant_type), pointer<void>(dA));
}

}  // namespace

void bind_extras(pybind11::module_& m) {
  choose_isa();
  m.def("set_openmp", &set_openmp, pybind11::arg("libtorch_cpu_path"),
        "Run on the OpenMP runtime that this library uses; RuntimeError where it has none.");
  m.def("openmp_path", &openmp_path, "The file of that runtime, None before set_openmp.");
  m.def("gemm_4bit_backward", &gemm_4bit_backward, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "dA = dY @ dequantized(packed) in one, with the arguments of gemm_4bit but for the bias; False, and "
        "nothing done, where the instruction set that serves has no kernel for them.");
  m.def("isas_built", &isas_built, "Names of the instruction sets in this build, ascending.");
  m.def("isas_available", &isas_available, "Those that this machine can run.");
  m.def("isa", &isa, "The instruction set that serves.");
  m.def("set_isa", &set_isa, pybind11::arg("name"), "Choose it; ValueError for a name not available.");
}

}  // namespace bnb
