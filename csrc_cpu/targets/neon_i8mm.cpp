#define BNB_TARGET neon_i8mm
#include "../simd/neon.h"

#include "../generic/table.h"
#include "../neon/int8_mmla.h"

namespace bnb::neon_i8mm {
namespace {

struct Mmla : NoneOfItsOwn {
  using Int8 = MmlaInt8;
};

}  // namespace
}  // namespace bnb::neon_i8mm

const bnb::Target bnb::neon_i8mm_target =
    bnb::neon_i8mm::target<bnb::neon_i8mm::DotprodDot, bnb::neon_i8mm::Mmla>();
