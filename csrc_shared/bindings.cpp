// Every function of kernels.h for Python, once for all kernel sets. The arguments were checked in Python.
#include "bind.h"
#include "kernels.h"

namespace bnb {

// Each kernel set defines what its own module has in addition.
void bind_extras(Module& m);

namespace {

using binding::States32bit;
using binding::States8bit;
using binding::Step;
using binding::TensorList;

// Calls update with the parameters of a step, which `parameter` makes from each one's place in the lists.
template <class Make, class Update>
void with_parameters(const TensorList& p, const TensorList& counts, const Make& parameter,
                     const Update& update) {
  using Parameter = decltype(parameter(size_t{0}));
  if (p.size() == 1) {
    const Parameter one = parameter(0);
    const double* const count = counts.at<const double>(0);
    return update(Parameters<Parameter>{&one, 1, p.dtype(), count ? &count : nullptr});
  }
  std::vector<Parameter> many;
  many.reserve(p.size());
  for (size_t i = 0; i < p.size(); i++) many.push_back(parameter(i));
  std::vector<const double*> counted;
  for (size_t i = 0; i < counts.size(); i++) counted.push_back(counts.at<const double>(i));
  update(Parameters<Parameter>{many.data(), static_cast<int64_t>(many.size()), p.dtype(),
                               counted.empty() ? nullptr : counted.data()});
}

void optimizer_update_32bit(const Step& step, const TensorList& g, const TensorList& p,
                            const States32bit& states, double* norms, Stream stream) {
  const auto parameter = [&](size_t i) {
    return Parameter32bit{g.at<void>(i), p.at<void>(i), p.count(i), states.state1.at<float>(i),
                          states.state2.at<float>(i)};
  };
  with_parameters(p, step.counts, parameter, [&](const Parameters<Parameter32bit>& parameters) {
    kernels().optimizer_update_32bit(step.settings, parameters, norms, stream);
  });
}

void optimizer_update_8bit_blockwise(const Step& step, const TensorList& g, const TensorList& p,
                                     const States8bit& states, double* norms, Stream stream) {
  const auto parameter = [&](size_t i) {
    return Parameter8bit{g.at<void>(i),
                         p.at<void>(i),
                         p.count(i),
                         states.state1.at<uint8_t>(i),
                         states.state2.at<uint8_t>(i),
                         states.absmax1.at<float>(i),
                         states.absmax2.at<float>(i)};
  };
  with_parameters(p, step.counts, parameter, [&](const Parameters<Parameter8bit>& parameters) {
    kernels().optimizer_update_8bit_blockwise(step.settings, parameters, states.codebooks, norms, stream);
  });
}

void bind_all(Module& m) {
  m.bind<&Kernels::quantize_blockwise>("quantize_blockwise");
  m.bind<&Kernels::dequantize_blockwise>("dequantize_blockwise");
  m.bind<&Kernels::quantize_4bit>("quantize_4bit");
  m.bind<&Kernels::dequantize_4bit>("dequantize_4bit");
  m.bind<&Kernels::gemm_4bit>("gemm_4bit");
  m.bind<&Kernels::gemm_4bit_backward>("gemm_4bit_backward");
  m.bind<&Kernels::grouped_gemm_4bit>("grouped_gemm_4bit");
  m.bind<&Kernels::grouped_gemm_4bit_backward>("grouped_gemm_4bit_backward");
  m.bind<&Kernels::int8_vectorwise_quant>("int8_vectorwise_quant");
  m.bind<&Kernels::int8_columnwise_quant>("int8_columnwise_quant");
  m.bind<&Kernels::int8_vectorwise_dequant>("int8_vectorwise_dequant");
  m.bind<&Kernels::int8_linear_matmul>("int8_linear_matmul");
  m.bind<&Kernels::int8_mm_dequant>("int8_mm_dequant");
  m.bind<&Kernels::int8_mixed_scaled_mm>("int8_mixed_scaled_mm");
  m.bind<&Kernels::int8_linear_backward>("int8_linear_backward");
  m.bind<&optimizer_update_32bit>("optimizer_update_32bit");
  m.bind<&optimizer_update_8bit_blockwise>("optimizer_update_8bit_blockwise");
  bind_extras(m);
}

}  // namespace
}  // namespace bnb

#define BNB_TEXT(name) #name
#define BNB_EXPANDED_TEXT(name) BNB_TEXT(name)
#define BNB_INIT(name) PyInit_##name
#define BNB_EXPANDED_INIT(name) BNB_INIT(name)

PyMODINIT_FUNC BNB_EXPANDED_INIT(BNB_MODULE_NAME)() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   BNB_EXPANDED_TEXT(BNB_MODULE_NAME),
                                   nullptr,
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  PyObject* const module = bnb::create_module(definition);
  if (!module) return nullptr;
  bnb::binding::exchange = bnb::dlpack::find_exchange();
  bnb::Module m(module);
  try {
    bnb::bind_all(m);
  } catch (...) {
    bnb::binding::set_error();
  }
  if (!PyErr_Occurred()) return module;
  Py_DECREF(module);
  return nullptr;
}
