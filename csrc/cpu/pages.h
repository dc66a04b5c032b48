// Large pages for large outputs.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace icseg {

// Asks the system to back fresh memory that is about to be written with large pages: what a large tensor costs in page
// faults of 4 KB each can be more than the writing. Only a hint, and nothing where memory is in use already.
inline void expect_writes(const void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr int64_t least = 4 << 20, page = 4096;
    if (memory == nullptr || bytes < least) return;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

}  // namespace icseg
