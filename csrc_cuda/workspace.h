// Scratch memory on the device for the length of one call.
#pragma once

#include "launch.h"

namespace bnb {

// Allocated and freed in the stream's order: no synchronization, and legal while a graph is captured. It
// comes from a pool of our own that keeps some of what it once had, so that most calls cost no driver call.
class Workspace {
 public:
  Workspace(size_t bytes, Stream stream);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  cudaStream_t stream_;
};

}  // namespace bnb
