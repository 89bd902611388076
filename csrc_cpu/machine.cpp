#include "machine.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace bnb {
#if defined(__x86_64__)
namespace {

struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Cpuid(unsigned leaf, unsigned subleaf = 0) {
    __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx);
  }
};

bool bits_set(unsigned value, unsigned mask) { return (value & mask) == mask; }

// Whether the system saves the register state that `mask` names when it switches threads.
bool system_saves(unsigned mask) {
  if (!bits_set(Cpuid(1).ecx, bit_OSXSAVE)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return bits_set(low, mask);
}

constexpr unsigned kYmmState = 0x06;
constexpr unsigned kZmmState = 0xe6;

constexpr unsigned kAvx512Bf16 = 1u << 5;   // cpuid 7.1, eax
constexpr unsigned kAvx512Fp16 = 1u << 23;  // cpuid 7, edx
constexpr unsigned kTileState = 0x60000;
constexpr unsigned kTileFeatures =
    1u << 22 | 1u << 24 | 1u << 25;  // cpuid 7, edx: AMX-BF16, AMX-TILE, AMX-INT8

// Linux grants the 8 KiB of tile state only to processes that ask for it. Other systems are not asked, and no
// tile used.
bool system_permits_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool has_avx2() {
  return system_saves(kYmmState) && bits_set(Cpuid(1).ecx, bit_AVX | bit_FMA | bit_F16C) &&
         bits_set(Cpuid(7).ebx, bit_AVX2);
}

bool has_avx512() {
  return has_avx2() && system_saves(kZmmState) &&
         bits_set(Cpuid(7).ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL);
}

bool has_avx512_vnni() { return has_avx512() && bits_set(Cpuid(7).ecx, bit_AVX512VNNI); }

bool has_avx512_bf16() {
  return has_avx512_vnni() && bits_set(Cpuid(7).ecx, bit_AVX512VBMI | bit_AVX512BITALG) &&
         bits_set(Cpuid(7, 1).eax, kAvx512Bf16);
}

bool has_amx() {
  return has_avx512_bf16() && system_saves(kTileState) && bits_set(Cpuid(7).edx, kTileFeatures) &&
         system_permits_tiles();
}
#elif defined(__aarch64__)
namespace {

// Whether the machine has an extension, by its name in the architecture. Elsewhere than on Linux and macOS
// nothing is asked, and none used.
#if defined(__APPLE__)
bool has_feature(const char* sysctl_name) {
  int32_t value = 0;
  size_t size = sizeof value;
  return sysctlbyname(sysctl_name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_feature("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__linux__)
bool has_dotprod() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }
bool has_i8mm() { return (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif

}  // namespace

bool has_neon_dotprod() { return has_dotprod(); }
bool has_neon_i8mm() { return has_dotprod() && has_i8mm(); }
#endif

bool multiplies(DType dtype) {
#if defined(__x86_64__)
  static const bool bf16 = has_avx512() && bits_set(Cpuid(7, 1).eax, kAvx512Bf16);
  static const bool f16 = has_avx512() && bits_set(Cpuid(7).edx, kAvx512Fp16);
  return dtype == DType::bf16 ? bf16 : dtype == DType::f16 && f16;
#elif defined(__aarch64__)
  // What torch multiplies these with there, and in which order it adds up, is not known for every machine.
  static_cast<void>(dtype);
  return false;
#else
  return dtype != DType::f32;
#endif
}

}  // namespace bnb
