// Every function of kernels.h for Python, once for all kernel sets. Pointers arrive as integers, 0 for null;
// the arguments were checked in Python.
#include <pybind11/pybind11.h>

#include <exception>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace py = pybind11;

namespace bnb {

// Each kernel set defines what its own module has in addition.
void bind_extras(py::module_& m);

namespace {

// What Python passes for a parameter of type T; where it is no such thing, an error of Python's is set.
template <class T>
T from_python(PyObject* object) {
  static_assert(std::is_pointer_v<T> || std::is_arithmetic_v<T> || std::is_enum_v<T>);
  if constexpr (std::is_pointer_v<T>) return static_cast<T>(PyLong_AsVoidPtr(object));
  if constexpr (std::is_same_v<T, bool>) return PyObject_IsTrue(object) == 1;
  if constexpr (std::is_floating_point_v<T>) return static_cast<T>(PyFloat_AsDouble(object));
  if constexpr (std::is_integral_v<T> || std::is_enum_v<T>) return static_cast<T>(PyLong_AsLongLong(object));
}

// Other threads of Python's go on meanwhile.
class Released {
 public:
  Released() : state_(PyEval_SaveThread()) {}
  ~Released() { PyEval_RestoreThread(state_); }
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;

 private:
  PyThreadState* state_;
};

// Functions of the table are looked up in it at each call, as a kernel set may choose another one.
template <class... Arguments>
void run(void (*Kernels::*function)(Arguments...), Arguments... arguments) {
  (kernels().*function)(arguments...);
}
template <class... Arguments>
void run(void (*function)(Arguments...), Arguments... arguments) {
  function(arguments...);
}

template <class Function, class... Arguments, size_t... i>
PyObject* call(Function function, std::tuple<Arguments...>*, std::index_sequence<i...>,
               PyObject* const* objects, Py_ssize_t count) {
  if (count != Py_ssize_t{sizeof...(Arguments)})
    return PyErr_Format(PyExc_TypeError, "expected %zu arguments, got %zd", sizeof...(Arguments), count);
  const std::tuple<Arguments...> arguments{from_python<Arguments>(objects[i])...};
  if (PyErr_Occurred()) return nullptr;
  try {
    const Released released;
    run(function, std::get<i>(arguments)...);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

template <class... Arguments>
std::tuple<Arguments...>* arguments_of(void (*Kernels::*)(Arguments...));
template <class... Arguments>
std::tuple<Arguments...>* arguments_of(void (*)(Arguments...));

template <auto function>
PyObject* method(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  using Arguments = decltype(arguments_of(function));
  constexpr size_t size = std::tuple_size_v<std::remove_pointer_t<Arguments>>;
  return call(function, Arguments{}, std::make_index_sequence<size>(), objects, count);
}

// Binds a function of the table, or any other, by Python's own protocol for fast calls: pybind11's dispatch
// takes a microsecond for as many arguments as these have.
template <auto function>
void bind(py::module_& m, const char* name) {
  using Erased = void (*)();
  static PyMethodDef definition{name,
                                reinterpret_cast<PyCFunction>(reinterpret_cast<Erased>(&method<function>)),
                                METH_FASTCALL, nullptr};
  m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_New(&definition, nullptr));
}

void gemm_4bit(const void* A, DType dtype, int64_t M, int64_t N, int64_t K, const uint8_t* packed,
               const float* absmax, const uint8_t* codes, const float* nested_absmax,
               const float* nested_code, const float* offset, int64_t nested_blocksize, int64_t blocksize,
               QuantType quant_type, const void* bias, void* out, void* stream) {
  const BlockScales scales{absmax, codes, nested_absmax, nested_code, offset, nested_blocksize};
  kernels().gemm_4bit(A, dtype, M, N, K, packed, scales, blocksize, quant_type, bias, out, stream);
}

void optimizer_update_32bit(OptimizerName name, int64_t step, double lr, double beta1, double beta2,
                            double beta3, double alpha, double eps, double weight_decay, double gnorm_scale,
                            double max_unorm, bool skip_zeros, const void* g, void* p, DType dtype,
                            float* state1, float* state2, int64_t n, double* norms, void* stream) {
  const OptimizerStep settings{name,  step, lr,           beta1,       beta2,     beta3,
                               alpha, eps,  weight_decay, gnorm_scale, max_unorm, skip_zeros};
  kernels().optimizer_update_32bit(settings, g, p, dtype, state1, state2, n, norms, stream);
}

void optimizer_update_8bit_blockwise(OptimizerName name, int64_t step, double lr, double beta1, double beta2,
                                     double beta3, double alpha, double eps, double weight_decay,
                                     double gnorm_scale, double max_unorm, bool skip_zeros, const void* g,
                                     void* p, DType dtype, uint8_t* state1, uint8_t* state2,
                                     const float* qmap1, const float* qmap2, float* absmax1, float* absmax2,
                                     int64_t n, double* norms, void* stream) {
  const OptimizerStep settings{name,  step, lr,           beta1,       beta2,     beta3,
                               alpha, eps,  weight_decay, gnorm_scale, max_unorm, skip_zeros};
  kernels().optimizer_update_8bit_blockwise(settings, g, p, dtype, state1, state2, qmap1, qmap2, absmax1,
                                            absmax2, n, norms, stream);
}

}  // namespace
}  // namespace bnb

PYBIND11_MODULE(BNB_MODULE_NAME, m) {
  using bnb::Kernels;
  bnb::bind<&Kernels::quantize_blockwise>(m, "quantize_blockwise");
  bnb::bind<&Kernels::dequantize_blockwise>(m, "dequantize_blockwise");
  bnb::bind<&Kernels::quantize_4bit>(m, "quantize_4bit");
  bnb::bind<&Kernels::dequantize_4bit>(m, "dequantize_4bit");
  bnb::bind<&Kernels::int8_vectorwise_quant>(m, "int8_vectorwise_quant");
  bnb::bind<&Kernels::int8_columnwise_quant>(m, "int8_columnwise_quant");
  bnb::bind<&Kernels::int8_vectorwise_dequant>(m, "int8_vectorwise_dequant");
  bnb::bind<&Kernels::int8_linear_matmul>(m, "int8_linear_matmul");
  bnb::bind<&Kernels::int8_mm_dequant>(m, "int8_mm_dequant");
  bnb::bind<&Kernels::int8_mixed_scaled_mm>(m, "int8_mixed_scaled_mm");
  bnb::bind<&bnb::gemm_4bit>(m, "gemm_4bit");
  bnb::bind<&bnb::optimizer_update_32bit>(m, "optimizer_update_32bit");
  bnb::bind<&bnb::optimizer_update_8bit_blockwise>(m, "optimizer_update_8bit_blockwise");
  bnb::bind_extras(m);
}
