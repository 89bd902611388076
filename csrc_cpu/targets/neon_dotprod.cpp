#define BNB_TARGET neon_dotprod
#include "../simd/neon.h"

#include "../generic/table.h"
#include "../neon/int8.h"

const bnb::Target bnb::neon_dotprod_target =
    bnb::neon_dotprod::target<bnb::neon_dotprod::DotprodDot, bnb::neon_dotprod::NoneOfItsOwn>();
