#define BNB_TARGET neon
#include "../simd/neon.h"

#include "../generic/table.h"
#include "../neon/int8.h"

const bnb::Target bnb::neon_target = bnb::neon::target<bnb::neon::WideningDot, bnb::neon::NoneOfItsOwn>();
