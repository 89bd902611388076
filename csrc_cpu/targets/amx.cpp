#define BNB_TARGET amx
#include "../simd/avx512.h"

#include "../amx/gemm_4bit_backward.h"
#include "../amx/int8.h"
#include "../generic/table.h"

namespace {

constexpr bnb::Kernels with_tiles() {
  bnb::Kernels table = bnb::amx::kTable;
  table.gemm_4bit = bnb::amx::gemm_4bit_amx;
  table.int8_linear_matmul = bnb::amx::int8_linear_matmul_amx;
  table.int8_mixed_scaled_mm = bnb::amx::int8_mixed_scaled_mm_amx;
  return table;
}

}  // namespace

const bnb::Kernels bnb::amx_kernels = with_tiles();
const bnb::Backward bnb::amx_backward = bnb::amx::gemm_4bit_backward;
const bnb::TileBackward bnb::amx_backward_on_tiles = bnb::amx::gemm_4bit_backward_amx;
