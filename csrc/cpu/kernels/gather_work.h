// How gather_patches reads coordinates and divides its work. Internal linkage, as all that a kernel file includes.
#pragma once

#include "../parallel.h"
#include "gather_patches.h"
#include "simd.h"

namespace {

inline int64_t ceil_divide(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Coordinate i of integer coords.
inline int64_t whole(const icseg::GatherCoords& coords, int64_t i) {
    return coords.type == ICSEG_COORDS_INT32 ? static_cast<const int32_t*>(coords.data)[i]
                                             : static_cast<const int64_t*>(coords.data)[i];
}

// Coordinate i of coords of any type.
inline double real(const icseg::GatherCoords& coords, int64_t i) {
    switch (coords.type) {
        case ICSEG_COORDS_FLOAT32: return static_cast<const float*>(coords.data)[i];
        case ICSEG_COORDS_FLOAT64: return static_cast<const double*>(coords.data)[i];
        default: return static_cast<double>(whole(coords, i));
    }
}

// Calls body(image, first patch, last patch, first channel, last channel) for blocks of patches that are written
// anew: many small patches of an image, or a few channels of a large one.
template <typename Body>
inline void for_blocks(const icseg::GatherSizes& s, int64_t element_bytes, int64_t bytes, const Body& body) {
    constexpr int64_t kBlockBytes = 32 * 1024;
    if (s.channels == 0 || s.count == 0) return;
    const int64_t plane = s.patch * s.patch * element_bytes;
    const int64_t channels = clamped(kBlockBytes / plane, 1, s.channels);
    const int64_t patches = clamped(kBlockBytes / (plane * channels), 1, s.count);
    const int64_t channel_blocks = ceil_divide(s.channels, channels), patch_blocks = ceil_divide(s.count, patches);
    parallel_for(s.outer * s.inner * patch_blocks * channel_blocks, bytes, [&](int64_t n) {
        const int64_t c = n % channel_blocks * channels, k = n / channel_blocks % patch_blocks * patches;
        body(n / channel_blocks / patch_blocks, k, smaller(k + patches, s.count), c, smaller(c + channels, s.channels));
    });
}

// Calls body(image, first row, last row, first channel, last channel) for bands of images that are written anew.
template <typename Body>
inline void for_bands(const icseg::GatherSizes& s, int64_t bytes, const Body& body) {
    constexpr int64_t kRows = 64, kChannels = 8;
    if (s.channels == 0 || s.height == 0 || s.width == 0) return;
    const int64_t bands = ceil_divide(s.height, kRows), channel_blocks = ceil_divide(s.channels, kChannels);
    parallel_for(s.outer * s.inner * channel_blocks * bands, bytes, [&](int64_t n) {
        const int64_t y = n % bands * kRows, c = n / bands % channel_blocks * kChannels;
        body(n / bands / channel_blocks, y, smaller(y + kRows, s.height), c, smaller(c + kChannels, s.channels));
    });
}

// Where image number `image` begins.
inline int64_t offset(int64_t image, const icseg::GatherSizes& s, const icseg::GatherStrides& stride) {
    return (image / s.inner) * stride.outer + (image % s.inner) * stride.inner;
}

}  // namespace
