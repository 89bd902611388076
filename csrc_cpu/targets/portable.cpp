#define BNB_TARGET portable
#include "../simd/portable.h"

#include "../generic/pairs_dot.h"
#include "../generic/table.h"

const bnb::Target bnb::portable_target =
    bnb::portable::target<bnb::portable::PairsDot, bnb::portable::NoneOfItsOwn>();
