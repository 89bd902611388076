#define BNB_TARGET avx512
#include "../simd/avx512.h"

#include "../generic/pairs_dot.h"
#include "../generic/table.h"

const bnb::Target bnb::avx512_target =
    bnb::avx512::target<bnb::avx512::PairsDot, bnb::avx512::NoneOfItsOwn>();
