// Checks of sizes that the entries share.
#pragma once

#include <climits>
#include <cstdint>
#include <initializer_list>

#include "../icseg_cuda.h"

namespace icseg_cuda {

inline bool any_negative(std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes) {
        if (size < 0) return true;
    }
    return false;
}

// An error code if k cannot be drawn from each of `batch` rows of `count`. `most` are kept of a row.
inline int checked_draw(int64_t batch, int64_t count, int64_t k, int64_t most) {
    if (any_negative({batch, count, k})) return ICSEG_CUDA_NEGATIVE_SIZE;
    if (k > count) return ICSEG_CUDA_DRAWS;
    if (most > ICSEG_CUDA_MOST_DRAWS || batch > INT_MAX || count > INT_MAX) return ICSEG_CUDA_TOO_LARGE;
    return ICSEG_CUDA_OK;
}

}  // namespace icseg_cuda
