// What Python passes for a parameter of a kernel. For a tensor that is a contiguous tensor, None or an
// address as an integer; for a struct of kernels.h a tensor, or the NamedTuple of bnb_core/records.py.
#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "kernels.h"
#include "python_module.h"

namespace bnb {
namespace binding {

inline const dlpack::Exchange* exchange = nullptr;  // the module's initialization looks for it

// The text of a str, as long as it lives; null with an error of Python's.
inline const char* text_of(PyObject* text) { return PyUnicode_AsUTF8AndSize(text, nullptr); }

inline long long number_from(PyObject* tensor, const char* method) {
  PyObject* number = PyObject_CallMethod(tensor, method, nullptr);
  const long long result = number ? PyLong_AsLongLong(number) : 0;
  Py_XDECREF(number);
  return result;
}

// What a tensor is. Where torch has no exchange API, or gives nothing for this one, it is asked in Python.
class TensorView {
 public:
  explicit TensorView(PyObject* tensor) : object_(tensor) {
    known_ = exchange && exchange->view(tensor, &view_) == 0;
    if (!known_) PyErr_Clear();
  }

  // Where the elements begin. torch gives null for a tensor that only stands for another: those go through
  // torch's dispatcher, which replaces them.
  void* address() const {
    void* const address = known_ ? view_.first() : reinterpret_cast<void*>(number_from(object_, "data_ptr"));
    if (!address && !PyErr_Occurred() && count() != 0 && !PyErr_Occurred()) {
      PyErr_SetString(PyExc_RuntimeError,
                      "a tensor has no memory: fake, functional and wrapped tensors go through "
                      "torch.ops.bnb_core, all of a call's or none");
    }
    return address;
  }

  int64_t count() const { return known_ ? view_.count() : number_from(object_, "numel"); }

  // The last dimension; 1 for a scalar.
  int64_t columns() const {
    if (known_) return view_.dimensions ? view_.shape[view_.dimensions - 1] : 1;
    if (number_from(object_, "dim") == 0) return 1;
    PyObject* const size = PyObject_CallMethod(object_, "size", "i", -1);
    const long long result = size ? PyLong_AsLongLong(size) : 0;
    Py_XDECREF(size);
    return result;
  }

  // The product of the others: of a tensor without columns, too.
  int64_t rows() const {
    if (known_) {
      int64_t result = 1;
      for (int32_t i = 0; i + 1 < view_.dimensions; i++) result *= view_.shape[i];
      return result;
    }
    const long long dimensions = number_from(object_, "dim");
    long long result = 1;
    for (long long i = 0; i + 1 < dimensions; i++) {
      PyObject* const size = PyObject_CallMethod(object_, "size", "L", i);
      result *= size ? PyLong_AsLongLong(size) : 0;
      Py_XDECREF(size);
    }
    return result;
  }

  // Of a tensor of floats.
  DType dtype() const {
    constexpr uint8_t kFloat = 2, kBfloat = 4;  // DLPack's codes
    if (known_) {
      if (view_.dtype.code == kBfloat) return DType::bf16;
      if (view_.dtype.code == kFloat && view_.dtype.bits == 16) return DType::f16;
      return DType::f32;
    }
    PyObject* const dtype = PyObject_GetAttrString(object_, "dtype");
    PyObject* const text = dtype ? PyObject_Str(dtype) : nullptr;
    const char* const name = text ? text_of(text) : "";
    const bool half = name && std::strstr(name, "float16");
    const DType result = !half ? DType::f32 : std::strstr(name, "bfloat16") ? DType::bf16 : DType::f16;
    Py_XDECREF(text);
    Py_XDECREF(dtype);
    return result;
  }

 private:
  PyObject* object_;
  dlpack::Tensor view_;
  bool known_;
};

inline void* address_of(PyObject* object) {
  if (object == Py_None) return nullptr;
  if (PyLong_Check(object)) return PyLong_AsVoidPtr(object);
  return TensorView(object).address();
}

// A list of tensors, or one that stands for a list of one, or None: their addresses and numbers of elements.
class TensorList {
 public:
  TensorList() = default;
  explicit TensorList(PyObject* object) {
    if (object == Py_None) return;
    if (!PyList_Check(object)) {
      add(object, one_);
      size_ = 1;
      return;
    }
    size_ = static_cast<size_t>(PyList_Size(object));
    many_.resize(size_);
    for (size_t i = 0; i < size_ && !PyErr_Occurred(); i++) add(PyList_GetItem(object, i), many_[i]);
  }

  size_t size() const { return size_; }
  int64_t count(size_t i) const { return tensor(i).count; }
  // Of the last one.
  DType dtype() const { return dtype_; }
  // Null where the list has no such tensor.
  template <class T>
  T* at(size_t i) const {
    return i < size_ ? static_cast<T*>(tensor(i).address) : nullptr;
  }

 private:
  struct Located {
    void* address = nullptr;
    int64_t count = 0;
  };

  void add(PyObject* tensor, Located& place) {
    const TensorView view(tensor);
    place = {view.address(), view.count()};
    dtype_ = view.dtype();
  }
  const Located& tensor(size_t i) const { return many_.empty() ? one_ : many_[i]; }

  size_t size_ = 0;
  Located one_;  // no memory is taken for a single tensor
  std::vector<Located> many_;
  DType dtype_ = DType::f32;
};

// The settings of a step; `counts` is empty where its number is among them.
struct Step {
  OptimizerStep settings;
  TensorList counts;
};

// The tensors of a step: lists of one length, empty for a state that the optimizer does not use.
struct States32bit {
  TensorList state1, state2;
};
struct States8bit {
  TensorList state1, state2;
  StateCodebooks codebooks;
  TensorList absmax1, absmax2;
};

// Which of the rows of a table has this name; an error of Python's is set where none has.
template <class Table, class NameOf>
int index_of_name(PyObject* object, const Table& table, const char* what, const NameOf& name_of) {
  const char* const name = PyUnicode_Check(object) ? text_of(object) : nullptr;
  int i = 0;
  for (const auto& row : table) {
    if (name && !std::strcmp(name, name_of(row))) return i;
    i++;
  }
  if (!PyErr_Occurred())
    PyErr_Format(PyExc_ValueError, "%s: %R is not built into these kernels", what, object);
  return 0;
}

template <class T>
T from_python(PyObject* object);

// The fields of a tuple, one after the other; an error of Python's is set where it has too few.
class Fields {
 public:
  explicit Fields(PyObject* tuple) : tuple_(tuple) {
    if (!PyTuple_Check(tuple)) PyErr_Format(PyExc_TypeError, "expected a tuple, got %R", Py_TYPE(tuple));
  }

  PyObject* next_object() {
    if (PyErr_Occurred()) return Py_None;
    if (at_ < PyTuple_Size(tuple_)) return PyTuple_GetItem(tuple_, at_++);
    PyErr_Format(PyExc_TypeError, "a tuple of %zd fields is too short", PyTuple_Size(tuple_));
    return Py_None;
  }
  template <class T>
  T next() {
    return from_python<T>(next_object());
  }

 private:
  PyObject* tuple_;
  Py_ssize_t at_ = 0;
};

// The sizes of a weight of any shape as [N, K].
inline void read_shape(PyObject* shape, Weight4bit& weight) {
  weight.N = weight.K = 1;
  if (PyErr_Occurred()) return;
  const Py_ssize_t dimensions = PySequence_Size(shape);
  for (Py_ssize_t i = 0; i < dimensions; i++) {
    PyObject* const item = PySequence_GetItem(shape, i);
    if (!item) return;
    int64_t& size = i + 1 < dimensions ? weight.N : weight.K;
    size *= PyLong_AsLongLong(item);
    Py_DECREF(item);
  }
}

inline Weight4bit read_weight_4bit(Fields fields) {
  Weight4bit weight{};
  weight.packed = fields.next<const uint8_t*>();
  read_shape(fields.next_object(), weight);
  void* const absmax = fields.next<void*>();
  weight.blocksize = fields.next<int64_t>();
  weight.quant_type = fields.next<QuantType>();
  PyObject* const nested_absmax = fields.next_object();
  if (nested_absmax == Py_None) {
    weight.scales = f32_scales(static_cast<const float*>(absmax));
    return weight;
  }
  weight.scales.codes = static_cast<const uint8_t*>(absmax);
  weight.scales.nested_absmax = from_python<const float*>(nested_absmax);
  weight.scales.nested_code = fields.next<const float*>();
  weight.scales.offset = fields.next<const float*>();
  weight.scales.nested_blocksize = fields.next<int64_t>();
  return weight;
}

inline double log_or_zero(double beta) { return beta > 0 ? std::log(beta) : 0; }

inline Step read_step(Fields fields) {
  OptimizerStep step{};
  step.name = fields.next<OptimizerName>();
  step.step = fields.next<int64_t>();
  for (double* number : {&step.lr, &step.beta1, &step.beta2, &step.beta3, &step.alpha, &step.eps,
                         &step.weight_decay, &step.gnorm_scale, &step.max_unorm})
    *number = fields.next<double>();
  step.skip_zeros = fields.next<bool>();
  step.t_alpha = fields.next<double>();
  step.t_beta3 = fields.next<double>();
  if (step.t_beta3 > 0) {
    step.log_beta1 = log_or_zero(step.beta1);
    step.log_beta3 = log_or_zero(step.beta3);
  }
  TensorList counts = fields.next<TensorList>();
  step.lr_in_memory = fields.next<const double*>();
  return {step, std::move(counts)};
}

// Braces, so that the fields are read in their order.
template <class T>
T read_fields(Fields fields) {
  if constexpr (std::is_same_v<T, Weight4bit>) return read_weight_4bit(fields);
  if constexpr (std::is_same_v<T, Step>) return read_step(fields);
  if constexpr (std::is_same_v<T, Int8Weight>)
    return T{fields.next<Rows<int8_t>>(), fields.next<const float*>()};
  if constexpr (std::is_same_v<T, Int8Product>) {
    Fields A(fields.next_object()), B(fields.next_object());
    return T{A.next<Rows<int8_t>>(), B.next<Rows<int8_t>>(), fields.next<const int32_t*>(),
             A.next<const float*>(), B.next<const float*>()};
  }
  if constexpr (std::is_same_v<T, Int8Outliers>)
    return T{fields.next<const void*>(), fields.next<const uint8_t*>()};
  if constexpr (std::is_same_v<T, States32bit>)
    return T{fields.next<TensorList>(), fields.next<TensorList>()};
  if constexpr (std::is_same_v<T, States8bit>)
    return T{fields.next<TensorList>(),
             fields.next<TensorList>(),
             {fields.next<const float*>(), fields.next<const float*>()},
             fields.next<TensorList>(),
             fields.next<TensorList>()};
}

// Where the object is no such thing, an error of Python's is set.
template <class T>
T from_python(PyObject* object) {
  if (PyErr_Occurred()) return T{};  // of an argument before
  if constexpr (std::is_same_v<T, TensorList>) {
    return TensorList(object);
  } else if constexpr (std::is_same_v<T, Matrix>) {
    const TensorView view(object);
    return {view.address(), view.dtype(), view.rows(), view.columns()};
  } else if constexpr (std::is_same_v<T, Rows<int8_t>>) {
    const TensorView view(object);
    return {static_cast<const int8_t*>(view.address()), view.rows(), view.columns()};
  } else if constexpr (std::is_same_v<T, Groups>) {
    const TensorView view(object);
    return {static_cast<const int32_t*>(view.address()), view.count() - 1};
  } else if constexpr (std::is_same_v<T, QuantType>) {
    const auto name = [](const Format4bit& format) { return format.name; };
    return static_cast<QuantType>(index_of_name(object, kFormats, "quant_type", name));
  } else if constexpr (std::is_same_v<T, OptimizerName>) {
    const auto name = [](const char* name) { return name; };
    return static_cast<OptimizerName>(index_of_name(object, kOptimizerNames, "optimizer_name", name));
  } else if constexpr (std::is_same_v<T, std::string>) {
    const char* const text = text_of(object);
    return text ? T(text) : T();
  } else if constexpr (std::is_class_v<T>) {
    return read_fields<T>(Fields(object));
  } else if constexpr (std::is_pointer_v<T>) {
    return static_cast<T>(address_of(object));
  } else if constexpr (std::is_same_v<T, bool>) {
    return PyObject_IsTrue(object) == 1;
  } else if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(PyFloat_AsDouble(object));
  } else {
    return static_cast<T>(PyLong_AsLongLong(object));
  }
}

}  // namespace binding
}  // namespace bnb
