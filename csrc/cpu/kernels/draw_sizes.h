// How much workspace a draw takes: for entries and kernels alike. Internal linkage (see isa.h).
#pragma once

#include <cstdint>

namespace {

// A row's buffer holds twice the keys of its k + 1 best, and these; see draw.h.
constexpr int64_t kSpare = 256;
// Up to so many draws, a row's workspace fits a thread's stack.
constexpr int64_t kStackDraws = 256;

constexpr int64_t buffer_keys(int64_t n, int64_t k) {
    return (n < 2 * (k + 1) + kSpare ? n : 2 * (k + 1) + kSpare) + 1;
}

// Keys of workspace that drawing k of n takes, each of twice the bytes of a logit.
constexpr int64_t draw_workspace(int64_t n, int64_t k) { return 2 * buffer_keys(n, k); }

// Enough for k <= kStackDraws and any n.
constexpr int64_t kStackKeys = draw_workspace(INT64_MAX, kStackDraws);

// Bytes of workspace that a caller must provide for a row of elements of element_bytes; 0 where the stack serves.
constexpr int64_t draw_row_bytes(int64_t n, int64_t k, int64_t element_bytes) {
    return k <= kStackDraws ? 0 : 2 * element_bytes * draw_workspace(n, k);
}

}  // namespace
