// Every function of kernels.h for Python, once for all kernel sets. The arguments were checked in Python.
#include <functional>

#include "bind.h"
#include "kernels.h"

namespace py = pybind11;

namespace bnb {

// Each kernel set defines what its own module has in addition, and in which order it works on several
// tensors.
void bind_extras(py::module_& m);
void for_each_tensor(const std::vector<int64_t>& counts, const std::function<void(size_t)>& body);

namespace {

void dequantize_4bit(const uint8_t* packed, const float* absmax, const uint8_t* codes,
                     const float* nested_absmax, const float* nested_code, const float* offset,
                     int64_t nested_blocksize, int64_t n, int64_t blocksize, QuantType quant_type, void* out,
                     DType dtype, void* stream) {
  const BlockScales scales{absmax, codes, nested_absmax, nested_code, offset, nested_blocksize};
  kernels().dequantize_4bit(packed, scales, n, blocksize, quant_type, out, dtype, stream);
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

using binding::TensorList;

// One step of several parameters, each as optimizer_update_32bit has it; an empty list where a state is
// unused.
void optimizer_updates_32bit(OptimizerName name, int64_t step, double lr, double beta1, double beta2,
                             double beta3, double alpha, double eps, double weight_decay, double gnorm_scale,
                             bool skip_zeros, TensorList g, TensorList p, DType dtype, TensorList state1,
                             TensorList state2, void* stream) {
  const OptimizerStep settings{name,  step, lr,           beta1,       beta2, beta3,
                               alpha, eps,  weight_decay, gnorm_scale, 0,     skip_zeros};
  for_each_tensor(p.counts, [&](size_t i) {
    kernels().optimizer_update_32bit(settings, g.at<void>(i), p.at<void>(i), dtype, state1.at<float>(i),
                                     state2.at<float>(i), p.counts[i], nullptr, stream);
  });
}

// The same of optimizer_update_8bit_blockwise.
void optimizer_updates_8bit_blockwise(OptimizerName name, int64_t step, double lr, double beta1, double beta2,
                                      double beta3, double alpha, double eps, double weight_decay,
                                      double gnorm_scale, bool skip_zeros, TensorList g, TensorList p,
                                      DType dtype, TensorList state1, TensorList state2, const float* qmap1,
                                      const float* qmap2, TensorList absmax1, TensorList absmax2,
                                      void* stream) {
  const OptimizerStep settings{name,  step, lr,           beta1,       beta2, beta3,
                               alpha, eps,  weight_decay, gnorm_scale, 0,     skip_zeros};
  for_each_tensor(p.counts, [&](size_t i) {
    kernels().optimizer_update_8bit_blockwise(
        settings, g.at<void>(i), p.at<void>(i), dtype, state1.at<uint8_t>(i), state2.at<uint8_t>(i), qmap1,
        qmap2, absmax1.at<float>(i), absmax2.at<float>(i), p.counts[i], nullptr, stream);
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
  bnb::bind<&bnb::dequantize_4bit>(m, "dequantize_4bit");
  bnb::bind<&Kernels::int8_vectorwise_quant>(m, "int8_vectorwise_quant");
  bnb::bind<&Kernels::int8_columnwise_quant>(m, "int8_columnwise_quant");
  bnb::bind<&Kernels::int8_vectorwise_dequant>(m, "int8_vectorwise_dequant");
  bnb::bind<&Kernels::int8_linear_matmul>(m, "int8_linear_matmul");
  bnb::bind<&Kernels::int8_mm_dequant>(m, "int8_mm_dequant");
  bnb::bind<&Kernels::int8_mixed_scaled_mm>(m, "int8_mixed_scaled_mm");
  bnb::bind<&bnb::gemm_4bit>(m, "gemm_4bit");
  bnb::bind<&bnb::optimizer_update_32bit>(m, "optimizer_update_32bit");
  bnb::bind<&bnb::optimizer_update_8bit_blockwise>(m, "optimizer_update_8bit_blockwise");
  bnb::bind<&bnb::optimizer_updates_32bit>(m, "optimizer_updates_32bit");
  bnb::bind<&bnb::optimizer_updates_8bit_blockwise>(m, "optimizer_updates_8bit_blockwise");
  bnb::bind_extras(m);
}
