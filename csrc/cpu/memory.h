// Memory that a call is about to write for the first time.
#pragma once

#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace icseg {

// Asks for huge pages under a large output. From this size on, malloc maps every block anew, and one fault for each
// 4 KB costs several times the writing itself.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr int64_t kLarge = 32 * 1024 * 1024;
    if (bytes < kLarge) return;
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: what it returns changes nothing
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace icseg
