// Memory before a page that nobody may read, as each system gives it.
#pragma once

#include <cstddef>
#include <new>

#if defined(_WIN32)
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

#if defined(_WIN32)
inline size_t page_size() {
  SYSTEM_INFO system{};
  GetSystemInfo(&system);
  return system.dwPageSize;
}
inline void* map_before_guard(size_t bytes) {
  void* const memory = VirtualAlloc(nullptr, bytes + page_size(), MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
  DWORD before = 0;
  if (!memory || !VirtualProtect(static_cast<char*>(memory) + bytes, page_size(), PAGE_NOACCESS, &before))
    throw std::bad_alloc();
  return memory;
}
inline void unmap(void* memory, size_t) { VirtualFree(memory, 0, MEM_RELEASE); }
#else
inline size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
inline void* map_before_guard(size_t bytes) {
  void* const memory =
      mmap(nullptr, bytes + page_size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(static_cast<char*>(memory) + bytes, page_size(), PROT_NONE);
  return memory;
}
inline void unmap(void* memory, size_t bytes) { munmap(memory, bytes + page_size()); }
#endif

}  // namespace
