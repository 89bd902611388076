#pragma once

#include "../device/half.h"
