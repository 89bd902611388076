#define BNB_TARGET amx
#include "../simd/avx512.h"

#include "../amx/gemm_4bit_backward.h"
#include "../amx/int8.h"
#include "../generic/table.h"

namespace bnb::amx {
namespace {

struct Tiles : NoneOfItsOwn {
  using Gemm4bit = TileGemm4bit;
  using Backward4bit = TileBackward4bit;
  using Int8 = TileInt8;
};

}  // namespace
}  // namespace bnb::amx

const bnb::Target bnb::amx_target = bnb::amx::target<bnb::amx::VnniDot, bnb::amx::Tiles>();
