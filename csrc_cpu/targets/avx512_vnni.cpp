#define BNB_TARGET avx512_vnni
#include "../simd/avx512.h"

#include "../avx512_vnni/int8.h"
#include "../generic/table.h"

namespace {

constexpr bnb::Kernels with_vnni() {
  bnb::Kernels table = bnb::avx512_vnni::kTable;
  table.int8_linear_matmul = bnb::avx512_vnni::int8_linear_matmul<bnb::avx512_vnni::VnniDot>;
  table.int8_mixed_scaled_mm = bnb::avx512_vnni::int8_mixed_scaled_mm<bnb::avx512_vnni::VnniDot>;
  return table;
}

}  // namespace

const bnb::Kernels bnb::avx512_vnni_kernels = with_vnni();
const bnb::Backward bnb::avx512_vnni_backward = bnb::avx512_vnni::gemm_4bit_backward;
