// The kernel of halvings; sizes are checked, and no product or sum of them overflows.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace {

inline int64_t half(int64_t length) { return length / 2 + length % 2; }

}  // namespace

namespace icseg {

struct Halvings {
    const float* image;
    float* const* means;
    float* const* deviations;
    int64_t channels, planes, height, width;  // planes: images * channels
    int64_t count, deviating;
    int64_t stride_image, stride_channel, stride_y;
    float* squares;  // the means of squares of the first deviating - 1 halvings, one after the other
};

ICSEG_KERNEL(void halvings(const Halvings& call))

}  // namespace icseg
