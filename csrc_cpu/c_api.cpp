#include "../csrc_shared/c_api.h"

#include <algorithm>

#include "dispatch.h"

namespace bnb {

// Where the codes stand for the values of a format, its kernel serves.
void gemm_4bit_of_code(const Matrix& A, const Weight4bit& weight, const float* code, void* out,
                       Stream stream) {
  for (const Format4bit& format : kFormats) {
    if (!std::equal(format.codebook, format.codebook + 16, code)) continue;
    Weight4bit known = weight;
    known.quant_type = format.quant_type;
    kernels().gemm_4bit(A, known, nullptr, out, stream);
    return;
  }
  target().gemm_4bit_of_code(A, weight, code, nullptr, out);
}

}  // namespace bnb
