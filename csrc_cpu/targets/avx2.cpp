#define BNB_TARGET avx2
#include "../simd/avx2.h"

#include "../avx2/encoder.h"
#include "../avx2/gemm_4bit.h"
#include "../generic/pairs_dot.h"
#include "../generic/table.h"

namespace bnb::avx2 {
namespace {

struct Planes : NoneOfItsOwn {
  using FormatEncoding = KeyEncoding;
  using Gemm4bit = PlanesGemm4bit;
};

}  // namespace
}  // namespace bnb::avx2

const bnb::Target bnb::avx2_target = bnb::avx2::target<bnb::avx2::PairsDot, bnb::avx2::Planes>();
