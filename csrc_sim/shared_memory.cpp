#include "shared_memory.h"

#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "device/language.h"

namespace bnb::simulator {
namespace {

constexpr size_t kPart = 512;

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
  segment_ = reinterpret_cast<char*>(segment.begin);
  segment_bytes_ = segment.bytes;
}

SharedMemory::~SharedMemory() { std::free(dynamic_); }

char* SharedMemory::part(size_t i) const { return segment_ + i * kPart; }
size_t SharedMemory::part_bytes(size_t i) const { return std::min(kPart, segment_bytes_ - i * kPart); }

void SharedMemory::prepare(const void* kernel, size_t dynamic_bytes) {
  use_ = &uses_[kernel];
  use_->written.resize((segment_bytes_ + kPart - 1) / kPart);
  std::free(dynamic_);
  dynamic_ = dynamic_bytes ? std::malloc(dynamic_bytes) : nullptr;
  if (dynamic_bytes && !dynamic_) throw std::bad_alloc();
  dynamic_bytes_ = dynamic_bytes;
}

// Whether the next block is one that is looked at: the first, second, fourth, eighth ... of its kernel.
bool SharedMemory::looks() const { return (use_->blocks & (use_->blocks + 1)) == 0; }

void SharedMemory::fill() {
  if (dynamic_) std::memset(dynamic_, 0xff, dynamic_bytes_);
  if (looks()) {
    std::memset(segment_, 0xff, segment_bytes_);
  } else {
    for (const size_t i : use_->parts) std::memset(part(i), 0xff, part_bytes(i));
  }
}

void SharedMemory::look() {
  static const std::string untouched(kPart, '\xff');
  for (size_t i = 0; looks() && i < use_->written.size(); ++i) {
    if (use_->written[i] || std::memcmp(part(i), untouched.data(), part_bytes(i)) == 0) continue;
    use_->written[i] = true;
    use_->parts.push_back(i);
  }
  ++use_->blocks;
}

}  // namespace bnb::simulator
