#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#elif defined(_WIN32)
#include <malloc.h>
#endif

namespace bnb {

void* allocate(size_t bytes) {
#if defined(_WIN32)
  void* memory = _aligned_malloc(bytes + 64, 64);
#else
  void* memory = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
#endif
  if (!memory) throw std::bad_alloc();
  advise_huge_pages(memory, bytes);
  return memory;
}

void deallocate(void* memory) {
#if defined(_WIN32)
  _aligned_free(memory);
#else
  std::free(memory);
#endif
}

void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kHugePage = size_t{1} << 21;
  constexpr size_t kLeastAdvised = 2 * kHugePage;
  if (bytes < kLeastAdvised) return;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace bnb
