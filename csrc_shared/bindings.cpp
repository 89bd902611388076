// Every function of kernels.h for Python, once for all kernel sets. The arguments were checked in Python.
#include "bind.h"
#include "kernels.h"

namespace py = pybind11;

namespace bnb {

// Each kernel set defines what its own module has in addition.
void bind_extras(py::module_& m);

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

}  // namespace
}  // namespace bnb

PYBIND11_MODULE(BNB_MODULE_NAME, m) {
  using bnb::Kernels;
  bnb::binding::exchange = bnb::dlpack::find_exchange();
  bnb::bind<&Kernels::quantize_blockwise>(m, "quantize_blockwise");
  bnb::bind<&Kernels::dequantize_blockwise>(m, "dequantize_blockwise");
  bnb::bind<&Kernels::quantize_4bit>(m, "quantize_4bit");
  bnb::bind<&Kernels::dequantize_4bit>(m, "dequantize_4bit");
  bnb::bind<&Kernels::gemm_4bit>(m, "gemm_4bit");
  bnb::bind<&Kernels::gemm_4bit_backward>(m, "gemm_4bit_backward");
  bnb::bind<&Kernels::grouped_gemm_4bit>(m, "grouped_gemm_4bit");
  bnb::bind<&Kernels::grouped_gemm_4bit_backward>(m, "grouped_gemm_4bit_backward");
  bnb::bind<&Kernels::int8_vectorwise_quant>(m, "int8_vectorwise_quant");
  bnb::bind<&Kernels::int8_columnwise_quant>(m, "int8_columnwise_quant");
  bnb::bind<&Kernels::int8_vectorwise_dequant>(m, "int8_vectorwise_dequant");
  bnb::bind<&Kernels::int8_linear_matmul>(m, "int8_linear_matmul");
  bnb::bind<&Kernels::int8_mm_dequant>(m, "int8_mm_dequant");
  bnb::bind<&Kernels::int8_mixed_scaled_mm>(m, "int8_mixed_scaled_mm");
  bnb::bind<&Kernels::int8_linear_backward>(m, "int8_linear_backward");
  bnb::bind<&bnb::optimizer_update_32bit>(m, "optimizer_update_32bit");
  bnb::bind<&bnb::optimizer_update_8bit_blockwise>(m, "optimizer_update_8bit_blockwise");
  bnb::bind_extras(m);
}
