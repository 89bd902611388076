// Binds functions by Python's own protocol for fast calls: pybind11's dispatch takes a microsecond for as
// many arguments as ours have.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>

#include "records.h"

namespace bnb {
namespace binding {

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
auto run(Function function, const Arguments&... arguments) {
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
  const std::tuple<std::decay_t<Arguments>...> arguments{from_python<std::decay_t<Arguments>>(objects[i])...};
  if (PyErr_Occurred()) return nullptr;
  try {
    using Result = decltype(run(function, std::get<i>(arguments)...));
    if constexpr (std::is_void_v<Result>) {
      run(function, std::get<i>(arguments)...);
      Py_RETURN_NONE;
    } else if constexpr (std::is_same_v<Result, bool>) {
      return PyBool_FromLong(run(function, std::get<i>(arguments)...));
    } else {
      return PyLong_FromLong(static_cast<long>(run(function, std::get<i>(arguments)...)));
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

// Binds a function of the table, or any other that returns nothing, a bool, an integer or an enum.
template <auto function>
void bind(pybind11::module_& m, const char* name, const char* documentation = nullptr) {
  using Erased = void (*)();
  const auto erased = reinterpret_cast<Erased>(&binding::method<function>);
  static PyMethodDef definition{name, reinterpret_cast<PyCFunction>(erased), METH_FASTCALL, documentation};
  m.attr(name) = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&definition, nullptr));
}

}  // namespace bnb
