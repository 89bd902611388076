// What a kernel set defines for the plain C symbols of c_api.cpp.
#pragma once

#include "kernels.h"

namespace bnb {

// The first entry of a codebook that lies in the memory of the kernels' device.
float first_entry(const float* code, Stream stream);

}  // namespace bnb
