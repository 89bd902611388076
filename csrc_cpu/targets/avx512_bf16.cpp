#define BNB_TARGET avx512_bf16
#include "../simd/avx512_vbmi.h"

#include "../avx512_bf16/encoder.h"
#include "../avx512_bf16/gemm_4bit.h"
#include "../avx512_bf16/gemm_4bit_backward.h"
#include "../avx512_vnni/int8.h"
#include "../generic/table.h"

namespace bnb::avx512_bf16 {
namespace {

struct Permutations : NoneOfItsOwn {
  using Encoding = RankEncoding;
  using Gemm4bit = StripGemm4bit;
  using Backward4bit = StripBackward4bit;
  using Int8 = StripInt8;
};

}  // namespace
}  // namespace bnb::avx512_bf16

const bnb::Target bnb::avx512_bf16_target =
    bnb::avx512_bf16::target<bnb::avx512_bf16::VnniDot, bnb::avx512_bf16::Permutations>();
