// Binds functions by Python's own protocol for fast calls: pybind11's dispatch takes a microsecond for as
// many arguments as ours have. For a pointer Python passes a contiguous tensor, None, or an integer.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "kernels.h"

namespace bnb {
namespace binding {

inline const dlpack::Exchange* exchange = nullptr;  // the module's initialization looks for it

inline long long number_from(PyObject* tensor, const char* method) {
  PyObject* number = PyObject_CallMethod(tensor, method, nullptr);
  const long long result = number ? PyLong_AsLongLong(number) : 0;
  Py_XDECREF(number);
  return result;
}

// Where the elements of a tensor begin. torch gives null for one that only stands for another: those go
// through torch's dispatcher, which replaces them.
inline void* address_of(PyObject* object) {
  if (object == Py_None) return nullptr;
  if (PyLong_Check(object)) return PyLong_AsVoidPtr(object);
  dlpack::Tensor tensor;
  void* address;
  bool empty;
  if (exchange && exchange->view(object, &tensor) == 0) {
    address = tensor.first();
    empty = tensor.empty();
  } else {
    PyErr_Clear();
    address = reinterpret_cast<void*>(number_from(object, "data_ptr"));
    empty = !PyErr_Occurred() && !address && number_from(object, "numel") == 0;
  }
  if (!address && !empty && !PyErr_Occurred()) {
    PyErr_SetString(PyExc_RuntimeError,
                    "a tensor has no memory: fake, functional and wrapped tensors go through "
                    "torch.ops.bnb_core, all of a call's or none");
  }
  return address;
}

inline int64_t count_of(PyObject* object) {
  dlpack::Tensor tensor;
  if (exchange && exchange->view(object, &tensor) == 0) return tensor.count();
  PyErr_Clear();
  return number_from(object, "numel");
}

// A list of tensors: their addresses and how many elements each has. An empty one stands for no tensors.
struct TensorList {
  std::vector<void*> addresses;
  std::vector<int64_t> counts;

  TensorList() = default;
  explicit TensorList(PyObject* list) {
    if (!PyList_Check(list)) {
      PyErr_SetString(PyExc_TypeError, "expected a list of tensors");
      return;
    }
    const Py_ssize_t size = PyList_GET_SIZE(list);
    addresses.reserve(size);
    counts.reserve(size);
    for (Py_ssize_t i = 0; i < size && !PyErr_Occurred(); i++) {
      PyObject* tensor = PyList_GET_ITEM(list, i);
      addresses.push_back(address_of(tensor));
      counts.push_back(count_of(tensor));
    }
  }
  size_t size() const { return addresses.size(); }
  template <class T>
  T* at(size_t i) const {
    return addresses.empty() ? nullptr : static_cast<T*>(addresses[i]);
  }
};

// What Python passes for a parameter of type T; where it is no such thing, an error of Python's is set.
template <class T>
T from_python(PyObject* object) {
  if (PyErr_Occurred()) return T{};  // of an argument before
  if constexpr (std::is_same_v<T, TensorList>) return TensorList(object);
  if constexpr (std::is_pointer_v<T>) return static_cast<T>(address_of(object));
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
template <class Function, class... Arguments>
auto run(Function function, Arguments... arguments) {
  const Released released;
  if constexpr (std::is_member_object_pointer_v<Function>) {
    return (kernels().*function)(arguments...);
  } else {
    return function(arguments...);
  }
}

template <class Function, class... Arguments, size_t... i>
PyObject* call(Function function, std::tuple<Arguments...>*, std::index_sequence<i...>,
               PyObject* const* objects, Py_ssize_t count) {
  if (count != Py_ssize_t{sizeof...(Arguments)})
    return PyErr_Format(PyExc_TypeError, "expected %zu arguments, got %zd", sizeof...(Arguments), count);
  const std::tuple<Arguments...> arguments{from_python<Arguments>(objects[i])...};
  if (PyErr_Occurred()) return nullptr;
  try {
    if constexpr (std::is_void_v<decltype(run(function, std::get<i>(arguments)...))>) {
      run(function, std::get<i>(arguments)...);
      Py_RETURN_NONE;
    } else {
      return PyBool_FromLong(run(function, std::get<i>(arguments)...));
    }
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "a kernel threw what is no std::exception");
  }
  return nullptr;
}

template <class Result, class... Arguments>
std::tuple<Arguments...>* arguments_of(Result (*Kernels::*)(Arguments...));
template <class Result, class... Arguments>
std::tuple<Arguments...>* arguments_of(Result (*)(Arguments...));

template <auto function>
PyObject* method(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  using Arguments = decltype(arguments_of(function));
  constexpr size_t size = std::tuple_size_v<std::remove_pointer_t<Arguments>>;
  return call(function, Arguments{}, std::make_index_sequence<size>(), objects, count);
}

}  // namespace binding

// Binds a function of the table, or any other that returns nothing or a bool.
template <auto function>
void bind(pybind11::module_& m, const char* name, const char* documentation = nullptr) {
  using Erased = void (*)();
  const auto erased = reinterpret_cast<Erased>(&binding::method<function>);
  static PyMethodDef definition{name, reinterpret_cast<PyCFunction>(erased), METH_FASTCALL, documentation};
  m.attr(name) = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&definition, nullptr));
}

}  // namespace bnb
