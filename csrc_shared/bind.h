// Binds functions for Python by its own protocol for fast calls, and by its stable interface alone.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "python_module.h"
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

// What is given to Python: a new reference, or null with an error of Python's.
inline PyObject* to_python(bool value) { return PyBool_FromLong(value); }
inline PyObject* to_python(uintptr_t value) { return PyLong_FromSize_t(value); }
inline PyObject* to_python(const std::string& text) { return PyUnicode_FromString(text.c_str()); }
inline PyObject* to_python(const char* text) {
  if (text) return PyUnicode_FromString(text);
  Py_RETURN_NONE;
}
inline PyObject* to_python(const std::vector<std::string>& texts) {
  PyObject* const list = PyList_New(static_cast<Py_ssize_t>(texts.size()));
  for (size_t i = 0; list && i < texts.size(); i++) {
    PyList_SetItem(list, static_cast<Py_ssize_t>(i), to_python(texts[i]));
  }
  return list;
}
template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer> || std::is_enum_v<Integer>>>
PyObject* to_python(Integer value) {
  return PyLong_FromLong(static_cast<long>(value));
}

// Sets the error of Python's that stands for the exception in flight.
inline void set_error() {
  try {
    throw;
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "a kernel threw what is no std::exception");
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
    } else {
      return to_python(run(function, std::get<i>(arguments)...));
    }
  } catch (...) {
    set_error();
    return nullptr;
  }
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

// A module while it is filled; what fails leaves an error of Python's.
class Module {
 public:
  explicit Module(PyObject* module) : module_(module) {}

  // Binds a function of the table, or any other that takes what records.h knows and returns nothing, a bool,
  // an integer, an enum, a text or texts. std::invalid_argument becomes ValueError, std::bad_alloc
  // MemoryError and any other exception RuntimeError.
  template <auto function>
  void bind(const char* name, const char* documentation = nullptr) {
    using Erased = void (*)();
    const auto erased = reinterpret_cast<Erased>(&binding::method<function>);
    static PyMethodDef definition{name, reinterpret_cast<PyCFunction>(erased), METH_FASTCALL, documentation};
    add(name, PyCFunction_NewEx(&definition, nullptr, nullptr));
  }

  template <class Value>
  void attribute(const char* name, const Value& value) {
    add(name, binding::to_python(value));
  }

 private:
  void add(const char* name, PyObject* object) {
    if (object) PyObject_SetAttrString(module_, name, object);
    Py_XDECREF(object);
  }

  PyObject* module_;
};

}  // namespace bnb
