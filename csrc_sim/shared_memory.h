// The shared memory of the block that an OS thread runs.
#pragma once

#include <cstddef>

namespace bnb::simulator {

// Static shared memory is thread_local (device/language.h) and thus lies in this module's thread-local
// segment, which is filled as a whole: nobody else's variables are there on an OS thread of the simulator, and
// the simulator sets its own again for each block.
class SharedMemory {
 public:
  // On the OS thread that is to run blocks.
  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // Exactly that much dynamic shared memory from now on.
  void resize(size_t bytes);
  // Every byte 0xff: NaN in every format.
  void fill();
  void* dynamic() const { return dynamic_; }

 private:
  void* segment_ = nullptr;
  size_t segment_bytes_ = 0;
  void* dynamic_ = nullptr;
  size_t dynamic_bytes_ = 0;
};

}  // namespace bnb::simulator
