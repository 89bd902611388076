// Scratch memory, and how large outputs come into being.
#pragma once

#include <cstddef>

namespace bnb {

// 64-byte aligned memory; throws std::bad_alloc.
void* allocate(size_t bytes);
void deallocate(void* memory);

// Asks for huge pages behind large memory that is about to be written: a page fault for every 4 KiB of a
// fresh tensor takes longer than dequantizing into it. Where the system has none, nothing happens.
void advise_huge_pages(void* memory, size_t bytes);

}  // namespace bnb
