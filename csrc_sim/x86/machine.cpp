// In place of csrc_cpu/machine.cpp: what has AVX2 has every instruction set.
#include "../../csrc_cpu/machine.h"

namespace bnb {

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() { return has_avx2(); }
bool has_avx512_vnni() { return has_avx2(); }
bool has_avx512_bf16() { return has_avx2(); }
bool has_amx() { return has_avx2(); }

// torch runs on the real machine: nothing is left to it.
bool multiplies(DType) { return false; }

}  // namespace bnb
