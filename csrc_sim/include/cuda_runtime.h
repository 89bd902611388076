// CUDA's runtime, simulated on the host.
#pragma once

#include "../device/asynchronous.h"
#include "../device/language.h"
#include "../device/launch.h"
#include "../device/memory_access.h"
#include "../device/numbers.h"
#include "../device/synchronization.h"
#include "../runtime.h"
