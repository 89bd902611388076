// What torch tells of a tensor by C functions: DLPack's exchange API (DLPack 1.3, struct DLPackExchangeAPI),
// in torch from 2.10 on. It takes no header of torch's, and no build for each of its versions.
#pragma once

#include <cstdint>

#include "python_module.h"

namespace bnb::dlpack {

struct Device {
  int32_t type, index;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

// The producer keeps shape and strides, in elements, until Python code runs again.
struct Tensor {
  void* data;
  Device device;
  int32_t dimensions;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // null: contiguous
  uint64_t byte_offset;

  void* first() const { return static_cast<char*>(data) + byte_offset; }

  int64_t count() const {
    int64_t result = 1;
    for (int32_t i = 0; i < dimensions; i++) result *= shape[i];
    return result;
  }

  bool empty() const { return count() == 0; }

  bool contiguous() const {
    if (!strides || empty()) return true;
    int64_t expected = 1;
    for (int32_t i = dimensions - 1; i >= 0; i--) {
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
};

struct Exchange {
  uint32_t major, minor;
  const Exchange* previous;
  void (*managed[3])();                // owning tensors, from Python, to it and new
  int (*view)(void* object, Tensor*);  // 0, or -1 with an error of Python's
  int (*stream)(int32_t, int32_t, void**);
};

// A new reference, or null with an error of Python's.
inline PyObject* attribute_of_torch(const char* name) {
  PyObject* torch = PyImport_ImportModule("torch");
  PyObject* attribute = torch ? PyObject_GetAttrString(torch, name) : nullptr;
  Py_XDECREF(torch);
  return attribute;
}

// torch's functions; null where it has none.
inline const Exchange* find_exchange() {
  PyObject* type = attribute_of_torch("Tensor");
  PyObject* capsule = type ? PyObject_GetAttrString(type, "__dlpack_c_exchange_api__") : nullptr;
  const void* found = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
  PyErr_Clear();
  Py_XDECREF(capsule);
  Py_XDECREF(type);
  constexpr uint32_t kMajor = 1;
  const auto* exchange = static_cast<const Exchange*>(found);
  return exchange && exchange->major == kMajor && exchange->view ? exchange : nullptr;
}

}  // namespace bnb::dlpack
