// A kernel's launch.
#pragma once

#include "../runtime.h"
#include "language.h"

namespace bnb {
namespace simulator {

enum class Maker { nvidia, amd };
#if defined(__HIP_PLATFORM_AMD__)
constexpr Maker kMaker = Maker::amd;
#else
constexpr Maker kMaker = Maker::nvidia;
#endif

struct Launch {
  Maker maker;  // of the device that the kernel's source is for
  const char* name;
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  void (*run_thread)(const void* call);
  const void* call;
};

// Runs every block, or leaves an error for cudaGetLastError where a device would refuse the launch.
//
// Throws std::runtime_error with kernel, block and thread where a thread of the kernel did what a device does
// not forgive, such as a barrier that part of the block never reaches; the simulator stays usable.
void run(const Launch& launch);

}  // namespace simulator

template <class T>
struct Same {
  using type = T;
};

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...); returns when the kernel has ended.
template <simulator::Maker maker = simulator::kMaker, class... Parameters>
void simulate(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
              cudaStream_t, typename Same<Parameters>::type... arguments) {
  const auto call = [&] { kernel(arguments...); };
  const auto run_thread = [](const void* call_address) { (*static_cast<decltype(&call)>(call_address))(); };
  simulator::run(
      {maker, name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, run_thread, &call});
}

}  // namespace bnb
