// The kernels of gather_patches; sizes are checked, and no product or sum of them overflows.
#pragma once

#include <cstdint>

#include "../../icseg.h"
#include "../isa.h"

namespace icseg {

// `patch`: pixels, or samples, a side.
struct GatherSizes {
    int64_t outer, inner, channels, height, width, count, patch;
    int64_t images_bytes, patches_bytes;
};

// In elements; `count` steps between the patches of an image.
struct GatherStrides {
    int64_t outer, inner, count, channel, y, x;
};

// [outer, inner, count, 2] (y, x) of the corners, contiguous, of an ICSEG_COORDS_ type.
struct GatherCoords {
    const void* data;
    int type;
};

// How a patch is resampled: its extent in pixels, and whether samples lie from edge to edge or at the centres of cells.
struct GatherGrid {
    double extent_y, extent_x;
    bool edge_to_edge;
};

ICSEG_KERNEL(template <typename Element>
             void gather(const Element* source, const GatherCoords& coords, Element* patches, const GatherSizes& s,
                         const GatherStrides& stride))
ICSEG_KERNEL(template <typename Real>
             void gather_backward(const Real* patches, const GatherCoords& coords, Real* images,
                                  const GatherSizes& s, const GatherStrides& stride))
ICSEG_KERNEL(template <typename Real>
             void gather_bilinear(const Real* source, const GatherCoords& coords, Real* patches,
                                  const GatherSizes& s, const GatherStrides& stride, const GatherGrid& grid))
ICSEG_KERNEL(template <typename Real>
             void gather_bilinear_backward(const Real* patches, const GatherCoords& coords, Real* images,
                                           const GatherSizes& s, const GatherStrides& stride, const GatherGrid& grid))

}  // namespace icseg
