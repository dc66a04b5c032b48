// The kernels of scatter_patches; sizes are checked, and no product or sum of them overflows.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace icseg {

struct Bfloat16 {
    uint16_t bits;
};

// What sums of Stored are taken in.
template <typename Stored>
struct SumOf {
    using type = float;
};
template <>
struct SumOf<double> {
    using type = double;
};
template <typename Stored>
using Sum = typename SumOf<Stored>::type;

struct ScatterSizes {
    int64_t batch, count, channels, patch, height, width;
    int64_t images_bytes, patches_bytes;
};

// In elements; `count` steps between the patches of an image.
struct ScatterStrides {
    int64_t batch, count, channel, y, x;
};

// [batch, count, 2] of int32, if narrow, or int64.
struct Corners {
    const void* values;
    bool narrow;
};

// weight, total: may be null (all ones; not wanted).
ICSEG_KERNEL(template <typename Stored>
             void scatter(const Stored* patches, Corners corners, const Sum<Stored>* weight, Stored* mean,
                          Sum<Stored>* total, uint8_t* coverage, double fill, const ScatterSizes& s,
                          const ScatterStrides& stride))
// stride.count is not used.
ICSEG_KERNEL(template <typename Stored>
             void scatter_backward(const Stored* grad, const Sum<Stored>* total, Corners corners,
                                   const Sum<Stored>* weight, Stored* patches, const ScatterSizes& s,
                                   const ScatterStrides& stride))

}  // namespace icseg
