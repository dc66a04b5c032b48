// gather_patches: an exact copy of patches, and its adjoint.
//
// Portable on purpose: a patch row is one memcpy, and an adjoint row one contiguous sum that the compiler
// vectorises; both wait for memory, so wider instructions chosen at run time would gain nothing.
#include <algorithm>
#include <cstring>

#include "../icseg.h"

namespace {

// Below this much traffic a parallel region costs more than it saves.
constexpr int64_t kParallelBytes = 256 * 1024;
constexpr int64_t kBandRows = 64;

// Patch rows or columns [first, last) that lie inside the image, for a patch whose corner is `corner`.
struct Span {
    int64_t corner, first, last;

    // Clamped before any sum, which could overflow: at -patch or at length a patch is already wholly outside.
    Span(int64_t coordinate, int64_t patch, int64_t length)
        : corner(std::clamp(coordinate, -patch, length)),
          first(std::max<int64_t>(0, -corner)),
          last(std::max(first, std::min(patch, length - corner))) {}

    bool contains(int64_t i) const { return i >= first && i < last; }
    bool empty() const { return first == last; }
};

template <typename Element>
void copy_row(const Element* from, int64_t stride, int64_t length, Element* to) {
    if (stride == 1) {
        std::memcpy(to, from, length * sizeof(Element));
        return;
    }
    for (int64_t i = 0; i < length; ++i) to[i] = from[i * stride];
}

struct Bytes16 {
    uint64_t low, high;
};

template <typename Element>
void gather(const Element* source, const int64_t* coords, Element* patches,
            int64_t outer, int64_t inner, int64_t channels, int64_t height, int64_t width,
            int64_t count, int64_t patch,
            int64_t stride_outer, int64_t stride_inner, int64_t stride_channel, int64_t stride_y, int64_t stride_x) {
    const int64_t elements = channels * patch * patch;
    const int64_t total = elements ? outer * inner * count : 0;
#pragma omp parallel for schedule(static) if (total * elements * int64_t(sizeof(Element)) > kParallelBytes)
    for (int64_t n = 0; n < total; ++n) {
        const int64_t image = n / count;
        const Element* from = source + (image / inner) * stride_outer + (image % inner) * stride_inner;
        Element* to = patches + n * elements;
        const Span y(coords[2 * n], patch, height), x(coords[2 * n + 1], patch, width);
        if (y.empty() || x.empty()) {
            std::memset(static_cast<void*>(to), 0, elements * sizeof(Element));
            continue;
        }
        for (int64_t c = 0; c < channels; ++c, from += stride_channel) {
            for (int64_t i = 0; i < patch; ++i, to += patch) {
                if (!y.contains(i)) {
                    std::memset(static_cast<void*>(to), 0, patch * sizeof(Element));
                    continue;
                }
                std::memset(static_cast<void*>(to), 0, x.first * sizeof(Element));
                copy_row(from + (y.corner + i) * stride_y + (x.corner + x.first) * stride_x, stride_x,
                         x.last - x.first, to + x.first);
                std::memset(static_cast<void*>(to + x.last), 0, (patch - x.last) * sizeof(Element));
            }
        }
    }
}

template <typename Real>
void add_row(const Real* from, int64_t stride, int64_t length, Real* to) {
    if (stride == 1) {
        for (int64_t i = 0; i < length; ++i) to[i] += from[i];
        return;
    }
    for (int64_t i = 0; i < length; ++i) to[i] += from[i * stride];
}

// Output-centric: each band of rows of a plane belongs to one thread, which adds the patches in order.
template <typename Real>
int gather_backward(const Real* patches, const int64_t* coords, Real* images,
                    int64_t outer, int64_t inner, int64_t count, int64_t channels, int64_t patch,
                    int64_t height, int64_t width,
                    int64_t stride_outer, int64_t stride_inner, int64_t stride_count, int64_t stride_channel,
                    int64_t stride_y, int64_t stride_x) {
    if (std::min({outer, inner, count, channels, height, width}) < 0) return ICSEG_NEGATIVE_SIZE;
    if (patch < 1) return ICSEG_PATCH_SIZE;
    const int64_t bands = (height + kBandRows - 1) / kBandRows;
    const int64_t total = width ? outer * inner * channels * bands : 0;
    const int64_t traffic = outer * inner * channels * (height * width + count * patch * patch) * sizeof(Real);
#pragma omp parallel for schedule(static) if (traffic > kParallelBytes)
    for (int64_t n = 0; n < total; ++n) {
        const int64_t plane = n / bands, image = plane / channels;
        const int64_t top = n % bands * kBandRows, bottom = std::min(top + kBandRows, height);
        const Real* from = patches + (image / inner) * stride_outer + (image % inner) * stride_inner +
                           (plane % channels) * stride_channel;
        Real* to = images + plane * height * width;
        std::memset(to + top * width, 0, (bottom - top) * width * sizeof(Real));
        for (int64_t k = 0; k < count; ++k, from += stride_count) {
            const int64_t* corner = coords + 2 * (image * count + k);
            const Span y(corner[0], patch, height), x(corner[1], patch, width);
            const int64_t last = std::min(y.corner + y.last, bottom);
            for (int64_t row = std::max(y.corner + y.first, top); row < last; ++row) {
                add_row(from + (row - y.corner) * stride_y + x.first * stride_x, stride_x, x.last - x.first,
                        to + row * width + x.corner + x.first);
            }
        }
    }
    return ICSEG_OK;
}

}  // namespace

int icseg_gather_patches(const void* source, const int64_t* coords, void* patches,
                         int64_t outer, int64_t inner, int64_t channels, int64_t height, int64_t width,
                         int64_t count, int64_t patch,
                         int64_t stride_outer, int64_t stride_inner, int64_t stride_channel,
                         int64_t stride_y, int64_t stride_x, int64_t element_bytes) {
    if (std::min({outer, inner, channels, height, width, count}) < 0) return ICSEG_NEGATIVE_SIZE;
    if (patch < 1) return ICSEG_PATCH_SIZE;
    const auto run = [&](auto element) {
        using Element = decltype(element);
        gather(static_cast<const Element*>(source), coords, static_cast<Element*>(patches), outer, inner, channels,
               height, width, count, patch, stride_outer, stride_inner, stride_channel, stride_y, stride_x);
        return ICSEG_OK;
    };
    switch (element_bytes) {
        case 1: return run(uint8_t());
        case 2: return run(uint16_t());
        case 4: return run(uint32_t());
        case 8: return run(uint64_t());
        case 16: return run(Bytes16());
        default: return ICSEG_ELEMENT_BYTES;
    }
}

int icseg_gather_patches_backward_f32(const float* patches, const int64_t* coords, float* images,
                                      int64_t outer, int64_t inner, int64_t count, int64_t channels,
                                      int64_t patch, int64_t height, int64_t width,
                                      int64_t stride_outer, int64_t stride_inner, int64_t stride_count,
                                      int64_t stride_channel, int64_t stride_y, int64_t stride_x) {
    return gather_backward(patches, coords, images, outer, inner, count, channels, patch, height, width, stride_outer,
                           stride_inner, stride_count, stride_channel, stride_y, stride_x);
}

int icseg_gather_patches_backward_f64(const double* patches, const int64_t* coords, double* images,
                                      int64_t outer, int64_t inner, int64_t count, int64_t channels,
                                      int64_t patch, int64_t height, int64_t width,
                                      int64_t stride_outer, int64_t stride_inner, int64_t stride_count,
                                      int64_t stride_channel, int64_t stride_y, int64_t stride_x) {
    return gather_backward(patches, coords, images, outer, inner, count, channels, patch, height, width, stride_outer,
                           stride_inner, stride_count, stride_channel, stride_y, stride_x);
}
