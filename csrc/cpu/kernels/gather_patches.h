// The kernels of gather_patches; sizes are checked, and no product or sum of them overflows.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace icseg {

struct GatherSizes {
    int64_t outer, inner, channels, height, width, count, patch;
    int64_t images_bytes, patches_bytes;
};

// In elements; `count` steps between the patches of an image.
struct GatherStrides {
    int64_t outer, inner, count, channel, y, x;
};

ICSEG_KERNEL(template <typename Element>
             void gather(const Element* source, const int64_t* coords, Element* patches, const GatherSizes& s,
                         const GatherStrides& stride))
ICSEG_KERNEL(template <typename Real>
             void gather_backward(const Real* patches, const int64_t* coords, Real* images, const GatherSizes& s,
                                  const GatherStrides& stride))

}  // namespace icseg
