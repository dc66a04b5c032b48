// The kernel of upsample_with_patches; sizes are checked, and no product or sum of them overflows.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace icseg {

struct UpsampleWithPatches {
    const float* coarser;
    const float* patches;
    const int64_t* coords;
    float* out;
    int64_t channels, planes;  // planes: batch * channels
    int64_t coarse_height, coarse_width, height, width;
    int64_t count, patch_height, patch_width;
    int64_t stride_batch, stride_channel, stride_y;
};

ICSEG_KERNEL(void upsample_with_patches(const UpsampleWithPatches& call))

}  // namespace icseg
