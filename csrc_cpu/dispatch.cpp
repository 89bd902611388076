#include "dispatch.h"

#include <stdexcept>

#include "machine.h"

namespace bnb {
namespace {

bool always() { return true; }

struct Isa {
  const char* name;
  bool (*available)();
  const Target* target;
};

// Ascending: the last one available is the default.
const Isa kIsas[] = {
    {"portable", always, &portable_target},
#if defined(__x86_64__)
    {"avx2", has_avx2, &avx2_target},
    {"avx512", has_avx512, &avx512_target},
    {"avx512_vnni", has_avx512_vnni, &avx512_vnni_target},
    {"avx512_bf16", has_avx512_bf16, &avx512_bf16_target},
    {"amx", has_amx, &amx_target},
#elif defined(__aarch64__)
    {"neon", always, &neon_target},
    {"neon_dotprod", has_neon_dotprod, &neon_dotprod_target},
    {"neon_i8mm", has_neon_i8mm, &neon_i8mm_target},
#endif
};

const Isa* chosen = &kIsas[0];

}  // namespace

std::vector<std::string> isas_built() {
  std::vector<std::string> names;
  for (const Isa& each : kIsas) names.push_back(each.name);
  return names;
}

std::vector<std::string> isas_available() {
  std::vector<std::string> names;
  for (const Isa& each : kIsas) {
    if (each.available()) names.push_back(each.name);
  }
  return names;
}

std::string isa() { return chosen->name; }

void set_isa(const std::string& name) {
  for (const Isa& each : kIsas) {
    if (name == each.name && each.available()) {
      chosen = &each;
      return;
    }
  }
  std::string message = "CPU instruction set '" + name + "' is not available; available here:";
  for (const std::string& available : isas_available()) message += " " + available;
  throw std::invalid_argument(message);
}

void choose_isa() { set_isa(isas_available().back()); }

const Target& target() { return *chosen->target; }

const Kernels& kernels() { return target().kernels; }

}  // namespace bnb
