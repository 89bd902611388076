#include "dispatch.h"

#include <stdexcept>

#include "machine.h"

namespace bnb {
namespace {

bool has_portable() { return true; }
#if defined(__aarch64__)
bool has_neon() { return true; }
#endif

struct Isa {
  const char* name;
  bool (*available)();
  const Target* target;
};

#define BNB_ISA(name) {#name, has_##name, &name##_target},
// setup.py lists what it builds, ascending: the last one available is the default.
const Isa kIsas[] = {BNB_ISAS};

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
