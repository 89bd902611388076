// Every function of kernels.h for Python, once for all kernel sets. Pointers arrive as integers, 0 for null;
// the arguments were checked in Python.
#include <pybind11/pybind11.h>

#include "kernels.h"

namespace py = pybind11;

namespace bnb {

// Each kernel set defines what its own module has in addition.
void bind_extras(py::module_& m);

namespace {

// A pointer that Python passes as an integer.
template <class T>
struct Pointer {
  T* value;
  operator T*() const { return value; }
};

}  // namespace
}  // namespace bnb

namespace pybind11::detail {

template <class T>
struct type_caster<bnb::Pointer<T>> {
  PYBIND11_TYPE_CASTER(bnb::Pointer<T>, const_name("int"));
  bool load(handle source, bool convert) {
    make_caster<uintptr_t> address;
    if (!address.load(source, convert)) return false;
    value.value = reinterpret_cast<T*>(static_cast<uintptr_t>(address));
    return true;
  }
};

template <class Enum>
struct code_caster {
  PYBIND11_TYPE_CASTER(Enum, const_name("int"));
  bool load(handle source, bool convert) {
    make_caster<int32_t> code;
    if (!code.load(source, convert)) return false;
    value = static_cast<Enum>(static_cast<int32_t>(code));
    return true;
  }
};
template <>
struct type_caster<bnb::DType> : code_caster<bnb::DType> {};
template <>
struct type_caster<bnb::QuantType> : code_caster<bnb::QuantType> {};
template <>
struct type_caster<bnb::OptimizerName> : code_caster<bnb::OptimizerName> {};

}  // namespace pybind11::detail

namespace bnb {
namespace {

// What Python passes for a parameter of type T.
template <class T>
struct Passed {
  using type = T;
};
template <class T>
struct Passed<T*> {
  using type = Pointer<T>;
};

// Binds a function of the table with the arguments it has; the table is asked at each call, as a kernel set
// may choose another one.
template <class... Arguments>
void bind(py::module_& m, const char* name, void (*Kernels::*function)(Arguments...)) {
  m.def(
      name,
      [function](typename Passed<Arguments>::type... arguments) { (kernels().*function)(arguments...); },
      py::call_guard<py::gil_scoped_release>());
}

void gemm_4bit(Pointer<const void> A, DType dtype, int64_t M, int64_t N, int64_t K,
               Pointer<const uint8_t> packed, Pointer<const float> absmax, Pointer<const uint8_t> codes,
               Pointer<const float> nested_absmax, Pointer<const float> nested_code,
               Pointer<const float> offset, int64_t nested_blocksize, int64_t blocksize, QuantType quant_type,
               Pointer<const void> bias, Pointer<void> out, Pointer<void> stream) {
  const BlockScales scales{absmax, codes, nested_absmax, nested_code, offset, nested_blocksize};
  kernels().gemm_4bit(A, dtype, M, N, K, packed, scales, blocksize, quant_type, bias, out, stream);
}

void optimizer_update_32bit(OptimizerName name, int64_t step, double lr, double beta1, double beta2,
                            double beta3, double alpha, double eps, double weight_decay, double gnorm_scale,
                            double max_unorm, bool skip_zeros, Pointer<const void> g, Pointer<void> p,
                            DType dtype, Pointer<float> state1, Pointer<float> state2, int64_t n,
                            Pointer<double> norms, Pointer<void> stream) {
  const OptimizerStep settings{name,  step, lr,           beta1,       beta2,     beta3,
                               alpha, eps,  weight_decay, gnorm_scale, max_unorm, skip_zeros};
  kernels().optimizer_update_32bit(settings, g, p, dtype, state1, state2, n, norms, stream);
}

void optimizer_update_8bit_blockwise(OptimizerName name, int64_t step, double lr, double beta1, double beta2,
                                     double beta3, double alpha, double eps, double weight_decay,
                                     double gnorm_scale, double max_unorm, bool skip_zeros,
                                     Pointer<const void> g, Pointer<void> p, DType dtype,
                                     Pointer<uint8_t> state1, Pointer<uint8_t> state2,
                                     Pointer<const float> qmap1, Pointer<const float> qmap2,
                                     Pointer<float> absmax1, Pointer<float> absmax2, int64_t n,
                                     Pointer<double> norms, Pointer<void> stream) {
  const OptimizerStep settings{name,  step, lr,           beta1,       beta2,     beta3,
                               alpha, eps,  weight_decay, gnorm_scale, max_unorm, skip_zeros};
  kernels().optimizer_update_8bit_blockwise(settings, g, p, dtype, state1, state2, qmap1, qmap2, absmax1,
                                            absmax2, n, norms, stream);
}

}  // namespace
}  // namespace bnb

PYBIND11_MODULE(BNB_MODULE_NAME, m) {
  using bnb::Kernels;
  bnb::bind(m, "quantize_blockwise", &Kernels::quantize_blockwise);
  bnb::bind(m, "dequantize_blockwise", &Kernels::dequantize_blockwise);
  bnb::bind(m, "quantize_4bit", &Kernels::quantize_4bit);
  bnb::bind(m, "dequantize_4bit", &Kernels::dequantize_4bit);
  bnb::bind(m, "int8_vectorwise_quant", &Kernels::int8_vectorwise_quant);
  bnb::bind(m, "int8_columnwise_quant", &Kernels::int8_columnwise_quant);
  bnb::bind(m, "int8_vectorwise_dequant", &Kernels::int8_vectorwise_dequant);
  bnb::bind(m, "int8_linear_matmul", &Kernels::int8_linear_matmul);
  bnb::bind(m, "int8_mm_dequant", &Kernels::int8_mm_dequant);
  bnb::bind(m, "int8_mixed_scaled_mm", &Kernels::int8_mixed_scaled_mm);
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("gemm_4bit", &bnb::gemm_4bit, no_gil);
  m.def("optimizer_update_32bit", &bnb::optimizer_update_32bit, no_gil);
  m.def("optimizer_update_8bit_blockwise", &bnb::optimizer_update_8bit_blockwise, no_gil);
  bnb::bind_extras(m);
}
