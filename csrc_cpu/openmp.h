#pragma once

#include <string>

namespace bnb {

// What is called of an OpenMP runtime. None is linked: torch has brought one, and two would fight for the
// cores.
struct OpenMP {
  // Runs body(data) on so many threads at once, the caller among them.
  void (*parallel)(void (*body)(void*), void* data, int threads);
  int (*max_threads)();
  int (*thread)();
  int (*threads)();
  int (*in_parallel)();
  std::string path;
};

// The runtime in a library that is loaded, or that this one depends on; otherwise that of the process.
//
// Throws std::runtime_error where there is none.
OpenMP find_openmp(const std::string& path);

}  // namespace bnb
