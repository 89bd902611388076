#define BNB_TARGET avx512_vnni
#include "../simd/avx512.h"

#include "../avx512_vnni/int8.h"
#include "../generic/table.h"

namespace bnb::avx512_vnni {
namespace {

struct Strips : NoneOfItsOwn {
  using Int8 = StripInt8;
};

}  // namespace
}  // namespace bnb::avx512_vnni

const bnb::Target bnb::avx512_vnni_target =
    bnb::avx512_vnni::target<bnb::avx512_vnni::VnniDot, bnb::avx512_vnni::Strips>();
