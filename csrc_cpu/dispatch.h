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

// The backward of gemm_4bit by the instruction set that serves.
Backward backward();

// The same on its tiles, null where it has none.
TileBackward backward_on_tiles();

// Whether the machine multiplies in this half precision, and torch's matmul with it, at more than the rate of
// f32. Never for f32.
bool multiplies(DType dtype);

// The most capable one; backends/cpu caps it by BNB_CPU_ISA.
void choose_isa();

}  // namespace bnb
