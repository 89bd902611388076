// Stands before the compiler's own <immintrin.h>: AVX-512 and AMX, said in C++, on any machine with AVX2.
//
// The intrinsics that csrc_cpu uses are functions of namespace bnb, so that its code finds them before the
// compiler's. GCC compiles it, without flags for what is simulated.
#pragma once

#include_next <immintrin.h>

#include "amx.h"
#include "avx512.h"
#include "avx512_bf16.h"
#include "avx512_bytes.h"
