// HIP's runtime, simulated on the host.
#pragma once

#include "../cuda_runtime.h"
#include "names.h"
