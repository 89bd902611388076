// A module of Python's, by its stable interface as of 3.10 (PEP 384): one build serves every newer Python. A
// free-threaded one has no such interface before 3.15 (PEP 803) and takes a build of its own.
#pragma once

#include <Python.h>

#if !defined(Py_LIMITED_API) && !defined(Py_GIL_DISABLED)
#error "setup.py asks for Python's stable interface"
#endif

namespace bnb {

// A new module of no state, which needs no lock of the interpreter's; null with an error of Python's.
inline PyObject* create_module(PyModuleDef& definition) {
  PyObject* const module = PyModule_Create(&definition);
#ifdef Py_GIL_DISABLED
  if (module) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
  return module;
}

}  // namespace bnb
