// Where a patch and an image overlap. Internal linkage, as all that a kernel file includes (see isa.h).
#pragma once

#include "simd.h"

namespace {

// Patch rows or columns [first, last) that lie inside the image, for a patch whose corner is `corner`.
struct Span {
    int64_t corner, first, last;

    // Clamped before any sum, which could overflow: at -patch or at length a patch is already wholly outside.
    Span(int64_t coordinate, int64_t patch, int64_t length)
        : corner(clamped(coordinate, -patch, length)),
          first(larger<int64_t>(0, -corner)),
          last(larger(first, smaller(patch, length - corner))) {}

    bool contains(int64_t i) const { return i >= first && i < last; }
    bool empty() const { return first == last; }
};

}  // namespace
