#include "shared_memory.h"

#include <link.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "device/language.h"

namespace bnb::simulator {
namespace {

struct Segment {
  uintptr_t within;  // an address in the segment that is searched
  uintptr_t begin;
  size_t bytes;
};

int find_segment(dl_phdr_info* info, size_t, void* data) {
  auto& wanted = *static_cast<Segment*>(data);
  const auto begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
  if (!begin) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_TLS || wanted.within - begin >= header.p_memsz) continue;
    wanted.begin = begin;
    wanted.bytes = header.p_memsz;
    return 1;
  }
  return 0;
}

}  // namespace

SharedMemory::SharedMemory() {
  Segment segment{reinterpret_cast<uintptr_t>(&threadIdx), 0, 0};
  if (!dl_iterate_phdr(find_segment, &segment))
    throw std::runtime_error("the simulator does not find its thread-local segment");
  segment_ = reinterpret_cast<void*>(segment.begin);
  segment_bytes_ = segment.bytes;
}

SharedMemory::~SharedMemory() { std::free(dynamic_); }

void SharedMemory::resize(size_t bytes) {
  std::free(dynamic_);
  dynamic_ = bytes ? std::malloc(bytes) : nullptr;
  if (bytes && !dynamic_) throw std::bad_alloc();
  dynamic_bytes_ = bytes;
}

void SharedMemory::fill() {
  std::memset(segment_, 0xff, segment_bytes_);
  if (dynamic_) std::memset(dynamic_, 0xff, dynamic_bytes_);
}

}  // namespace bnb::simulator
