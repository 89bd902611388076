// The shared memory of the block that an OS thread runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace bnb::simulator {

// Static shared memory is thread_local (device/language.h) and thus lies in this module's thread-local
// segment. Where the C library is a module of its own, nobody else's variables are there on an OS thread of
// the simulator, and the simulator sets its own again for each block, so that the segment could be filled as
// a whole. But it holds the arrays of every kernel: for most blocks only those parts are filled which some
// block of the kernel was seen to have written.
class SharedMemory {
 public:
  // On the OS thread that is to run blocks.
  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // For blocks of this kernel from now on, with exactly that much dynamic shared memory.
  void prepare(const void* kernel, size_t dynamic_bytes);
  // Before a block: every byte 0xff, NaN in every format.
  void fill();
  // After a block: sees what it has written.
  void look();
  void* dynamic() const { return dynamic_; }

 private:
  struct Use {
    uint64_t blocks = 0;
    std::vector<bool> written;  // by part of the segment
    std::vector<size_t> parts;  // those that are
  };
  bool looks() const;
  char* part(size_t i) const;
  size_t part_bytes(size_t i) const;

  char* segment_ = nullptr;
  size_t segment_bytes_ = 0;
  std::unordered_map<const void*, Use> uses_;
  Use* use_ = nullptr;
  void* dynamic_ = nullptr;
  size_t dynamic_bytes_ = 0;
};

}  // namespace bnb::simulator
