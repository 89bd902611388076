// Which instruction set serves, chosen once at run time.
#pragma once

#include <string>
#include <vector>

#include "targets/targets.h"

namespace bnb {

std::vector<std::string> isas_built();      // ascending
std::vector<std::string> isas_available();  // those of them that this machine and its system can run
std::string isa();                          // the one that serves

// Throws std::invalid_argument, listing what is available, for any other name.
void set_isa(const std::string& name);

// What the instruction set that serves exports.
const Target& target();

// The most capable one; backends/cpu caps it by BNB_CPU_ISA.
void choose_isa();

}  // namespace bnb
