// Threads for kernels. Internal linkage, as all that a kernel file includes (see isa.h).
#pragma once

#include <cstdint>

#include "isa.h"

namespace {

// Below this many bytes touched, a parallel region costs more than it saves.
constexpr int64_t kParallelBytes = 256 * 1024;

// body(i) for 0 <= i < count, on several threads if `bytes` of traffic (or as much work) make it worthwhile. A thread
// takes a contiguous range; which one does what never changes a result, as long as body(i) writes what no other does.
template <typename Body>
inline void parallel_for(int64_t count, int64_t bytes, const Body& body) {
    const int most = bytes > kParallelBytes && count > 1 ? icseg::threads() : 1;
    if (most == 1) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(most)
    for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace
