// bnb_core._signature: what the checks of a call look at, as bytes. bnb_core/signature.py says the same in
// Python, for where this is not built or torch has no exchange API.
#include <cstring>
#include <string>

#include "dlpack.h"

namespace bnb {
namespace {

const dlpack::Exchange* exchange;
PyObject* is_neg;             // torch.Tensor.is_neg
PyCFunction is_neg_function;  // what is behind it
PyObject* call_as_plain;      // torch._C._disabled_torch_function_impl
PyObject* no_types;
PyTypeObject* tensor_type;
PyTypeObject* parameter_type;
PyTypeObject* dtype_type;
PyTypeObject* size_type;

class Signature {
 public:
  // Whether the argument is of a kind that can be told; if not, or if it cannot be read, no error is set.
  bool add(PyObject* argument) {
    if (argument == Py_None) return add_value('N', 0);
    PyTypeObject* const type = Py_TYPE(argument);
    if (type == tensor_type) return add_tensor(argument);
    if (type == &PyLong_Type) return add_integer(argument);
    if (type == &PyUnicode_Type) return add_text(argument);
    if (type == dtype_type) return add_value('D', argument);
    if (type == &PyBool_Type) return add_value('B', argument == Py_True);
    if (type == &PyFloat_Type) return add_value('F', PyFloat_AsDouble(argument));
    if (PyTuple_Check(argument) || PyList_Check(argument)) return add_items(argument);
    return PyType_IsSubtype(type, tensor_type) && add_tensor(argument);
  }

  bool add_items(PyObject* sequence) {
    const bool is_tuple = PyTuple_Check(sequence);
    const Py_ssize_t count = is_tuple ? PyTuple_Size(sequence) : PyList_Size(sequence);
    const PyTypeObject* const type = Py_TYPE(sequence);
    const bool plain = type == &PyTuple_Type || type == &PyList_Type || type == size_type;
    bool told = add_value('(', plain ? nullptr : type) && add_value(',', count);
    for (Py_ssize_t i = 0; told && i < count; i++) {
      PyObject* const item = is_tuple ? PyTuple_GetItem(sequence, i) : PyList_GetItem(sequence, i);
      if (!item) PyErr_Clear();
      told = item && add(item);
    }
    return told;
  }

  PyObject* bytes() const {
    if (longer_.empty()) return PyBytes_FromStringAndSize(bytes_, size_);
    return PyBytes_FromStringAndSize(longer_.data(), longer_.size());
  }

 private:
  // On the stack as long as it fits: only lists of tensors take more.
  bool add_bytes(const void* data, size_t size) {
    if (longer_.empty() && size <= sizeof bytes_ - size_) {
      std::memcpy(bytes_ + size_, data, size);
      size_ += size;
      return true;
    }
    if (longer_.empty()) longer_.assign(bytes_, size_);
    longer_.append(static_cast<const char*>(data), size);
    return longer_.size() <= kMost;
  }

  template <class T>
  bool add_value(char kind, T value) {
    return add_bytes(&kind, 1) && add_bytes(&value, sizeof value);
  }

  bool add_integer(PyObject* argument) {
    int overflow;
    const long long value = PyLong_AsLongLongAndOverflow(argument, &overflow);
    return overflow == 0 && add_value('I', value);
  }

  bool add_text(PyObject* argument) {
    Py_ssize_t size;
    const char* text = PyUnicode_AsUTF8AndSize(argument, &size);
    if (!text) PyErr_Clear();
    return text && add_value('S', size) && add_bytes(text, size);
  }

  bool add_tensor(PyObject* argument) {
    dlpack::Tensor tensor;
    if (exchange->view(argument, &tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    return add_value('T', tensor.device) && add_value(':', tensor.dtype) &&
           add_value(tensor.contiguous() && !is_negated(argument) ? 'c' : 's', tensor.dimensions) &&
           add_bytes(tensor.shape, tensor.dimensions * sizeof(int64_t));
  }

  // Whether the memory holds the values with the other sign, which DLPack does not tell.
  static bool is_negated(PyObject* tensor) {
    const bool plain = Py_TYPE(tensor) == tensor_type || Py_TYPE(tensor) == parameter_type;
    PyObject* negated = plain ? is_neg_function(tensor, nullptr) : is_neg_of_subclass(tensor);
    if (!negated) PyErr_Clear();
    Py_XDECREF(negated);
    return negated != Py_False;
  }

  // Has torch not ask the class what its methods do: for a parameter of ours that takes longer than all the
  // rest.
  static PyObject* is_neg_of_subclass(PyObject* tensor) {
    PyObject* const arguments = PyTuple_Pack(1, tensor);
    if (!arguments) return nullptr;
    PyObject* const result =
        PyObject_CallFunctionObjArgs(call_as_plain, is_neg, no_types, arguments, nullptr);
    Py_DECREF(arguments);
    return result;
  }

  static constexpr size_t kMost = 1 << 20;

  char bytes_[1024];
  size_t size_ = 0;
  std::string longer_;
};

PyObject* signature(PyObject*, PyObject* arguments) {
  if (!PyTuple_Check(arguments)) return PyErr_Format(PyExc_TypeError, "arguments: expected a tuple");
  Signature result;
  if (!result.add_items(arguments)) Py_RETURN_NONE;
  return result.bytes();
}

PyTypeObject* type_of_torch(const char* name) {
  return reinterpret_cast<PyTypeObject*>(dlpack::attribute_of_torch(name));
}

// Whether torch has what there is to call of a tensor; if not, with an error of Python's.
bool find_calls() {
  is_neg = PyObject_GetAttrString(reinterpret_cast<PyObject*>(tensor_type), "is_neg");
  PyObject* const nn = dlpack::attribute_of_torch("nn");
  parameter_type = nn ? reinterpret_cast<PyTypeObject*>(PyObject_GetAttrString(nn, "Parameter")) : nullptr;
  Py_XDECREF(nn);
  PyObject* const internals = dlpack::attribute_of_torch("_C");
  call_as_plain = internals ? PyObject_GetAttrString(internals, "_disabled_torch_function_impl") : nullptr;
  Py_XDECREF(internals);
  no_types = PyTuple_New(0);
  PyObject* const tensor = PyObject_CallNoArgs(reinterpret_cast<PyObject*>(tensor_type));
  PyObject* const bound = tensor ? PyObject_GetAttrString(tensor, "is_neg") : nullptr;
  Py_XDECREF(tensor);
  const bool takes_nothing = bound && PyCFunction_Check(bound) && PyCFunction_GetFlags(bound) == METH_NOARGS;
  is_neg_function = takes_nothing ? PyCFunction_GetFunction(bound) : nullptr;
  Py_XDECREF(bound);
  if (!is_neg_function && !PyErr_Occurred())
    PyErr_SetString(PyExc_ImportError, "torch.Tensor.is_neg is no function without arguments in C");
  return is_neg && parameter_type && call_as_plain && no_types && is_neg_function;
}

}  // namespace
}  // namespace bnb

PyMODINIT_FUNC PyInit__signature() {
  using namespace bnb;
  exchange = dlpack::find_exchange();
  if (!exchange) {
    PyErr_SetString(PyExc_ImportError, "this torch has no DLPack exchange API; 2.10 and newer have");
    return nullptr;
  }
  tensor_type = type_of_torch("Tensor");
  dtype_type = type_of_torch("dtype");
  size_type = type_of_torch("Size");
  if (!tensor_type || !dtype_type || !size_type || !find_calls()) return nullptr;
  static PyMethodDef methods[] = {{"signature", signature, METH_O, nullptr}, {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_signature", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return create_module(definition);
}
