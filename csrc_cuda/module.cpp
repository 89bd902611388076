// What a GPU's kernel module has besides the kernels: versions, and managed memory.
#include <cuda_runtime.h>

#include "../csrc_shared/gpu_platform.h"
#include "check.h"
#include "device_bindings.h"

namespace bnb {
namespace {

// The version of the driver's API, such as 13000; 0 where there is no driver.
int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

}  // namespace

void bind_extras(Module& m) {
  m.bind<&driver_version>("driver_version", "The version of the driver's API; 0 without a driver.");
  m.bind<&runtime_version>("runtime_version", "The version of the runtime.");
  m.bind<&runtime_path>("runtime_path", "The file of the runtime; None where it is a part of this module.");
  m.bind<&missing_runtime>("missing_runtime", "Why there is no runtime to call; None where there is one.");
  m.attribute("archs", BNB_GPU_ARCHS);
  bind_device_extras(m);
}

}  // namespace bnb
