#define BNB_TARGET avx2
#include "../simd/avx2.h"

#include "../generic/pairs_dot.h"
#include "../generic/table.h"

const bnb::Target bnb::avx2_target = bnb::avx2::target<bnb::avx2::PairsDot, bnb::avx2::NoneOfItsOwn>();
