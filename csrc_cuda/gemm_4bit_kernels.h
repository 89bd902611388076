// The kernels for products with a 4-bit weight by name, and how one is chosen for a product: by the chip, the
// rows of A and the size of the weight. No GPU code: whoever checks a table of choices reads this alone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bnb {

// Each kernel once; those on tensor cores bear the number of rows of A that a block takes. gemm_4bit.cu says
// which products each takes, and launches it.
// clang-format off
#define BNB_GEMM_4BIT_KERNELS(kernel) \
  kernel(f32)    /* multiply-adds, any product */ \
  kernel(mma8)   /* gemm_4bit_mma.h */ \
  kernel(mma16) \
  kernel(mma32) \
  kernel(mma64) \
  kernel(staged8_wide)     /* gemm_4bit_staged.cu */ \
  kernel(staged8_permuted) \
  kernel(staged8_deep) \
  kernel(staged8_two) \
  kernel(staged16) \
  kernel(staged32) \
  kernel(staged48) \
  kernel(staged64) \
  kernel(wgmma)  /* gemm_4bit_wgmma.h */ \
  kernel(dense)  /* torch's, of the dequantized weight */
// clang-format on

enum class Gemm4bitKernel : int32_t {
#define BNB_NAME(name) name,
  BNB_GEMM_4BIT_KERNELS(BNB_NAME)
#undef BNB_NAME
};

constexpr const char* kGemm4bitKernelNames[] = {
#define BNB_NAME(name) #name,
    BNB_GEMM_4BIT_KERNELS(BNB_NAME)
#undef BNB_NAME
};
constexpr int kGemm4bitKernels = sizeof(kGemm4bitKernelNames) / sizeof(*kGemm4bitKernelNames);

constexpr int64_t kAnyNumber = INT64_MAX;

// A row of the table in gemm_4bit_choices.h: up to so many rows of A and so many weights (N * K).
struct Gemm4bitChoice {
  int chip;  // compute capability, such as 90; kAnyChip
  int64_t most_rows, most_weights;
  Gemm4bitKernel kernel;

  constexpr bool covers(int64_t M, int64_t weights) const {
    return M <= most_rows && weights <= most_weights;
  }
};

constexpr int kAnyChip = 0;

// The newest chip of the table that is not newer than this one.
template <size_t count>
int listed_chip(const Gemm4bitChoice (&choices)[count], int chip) {
  int listed = kAnyChip;
  for (const Gemm4bitChoice& choice : choices)
    if (choice.chip <= chip && choice.chip > listed) listed = choice.chip;
  return listed;
}

// The kernel for a product: of the chip's rows the first one that covers it, if that kernel takes it; else of
// the rows for any chip the first one that covers it and whose kernel takes it. The kernel f32 takes all.
template <size_t count, class Takes>
Gemm4bitKernel choose_gemm_4bit(const Gemm4bitChoice (&choices)[count], int chip, int64_t M, int64_t weights,
                                const Takes& takes) {
  const int listed = listed_chip(choices, chip);
  for (const Gemm4bitChoice& choice : choices) {
    if (listed == kAnyChip || choice.chip != listed || !choice.covers(M, weights)) continue;
    if (takes(choice.kernel)) return choice.kernel;
    break;
  }
  for (const Gemm4bitChoice& choice : choices)
    if (choice.chip == kAnyChip && choice.covers(M, weights) && takes(choice.kernel)) return choice.kernel;
  return Gemm4bitKernel::f32;
}

}  // namespace bnb
