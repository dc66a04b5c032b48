// The kernel of small_convolutions; sizes are checked, and no product or sum of them overflows.
#pragma once

#include <cstdint>

#include "../../icseg.h"
#include "../isa.h"

namespace icseg {

constexpr int64_t kMostLayers = 16;

// To a multiple of so many elements the channels of a map and of packed weights are filled up: a cache line, and whole
// vectors of every instruction set.
constexpr int64_t kChannelStep = 16;

// An image, or what a layer made of it: [height + 2 padding, width + 2 padding, pitch] in memory, with the padding of the
// layer that reads it.
struct Map {
    int64_t channels, height, width, padding, pitch;
    int64_t row;     // elements from a row to the next
    int64_t inside;  // where the first pixel of the image lies
};

struct SmallConvolutions {
    const float* x;
    float* out;
    int64_t images, stride_image, stride_channel, stride_y, stride_x;
    int64_t count;
    icseg_convolution layers[kMostLayers];
    Map maps[kMostLayers + 1];        // x, and the outputs of the layers
    int64_t packed[kMostLayers + 1];  // where a layer's packed weights and bias begin, and where the last ones end
    int64_t even, odd;                // elements of the two buffers of a slot, which hold the maps in turn
    int64_t slots;
    float* workspace;  // aligned to a cache line: packed weights, then the slots
    int64_t work;      // as bytes touched, for parallel_for
};

ICSEG_KERNEL(void small_convolutions(const SmallConvolutions& call))

}  // namespace icseg
