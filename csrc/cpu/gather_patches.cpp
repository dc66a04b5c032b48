// gather_patches: an exact copy of patches, and its adjoint.
//
// Portable on purpose: a patch row is one memcpy, and an adjoint row one contiguous sum that the compiler
// vectorises; both wait for memory, so wider instructions chosen at run time would gain nothing.
#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "../icseg.h"

namespace {

// Below this much traffic a parallel region costs more than it saves.
constexpr int64_t kParallelBytes = 256 * 1024;
constexpr int64_t kBandRows = 64;

struct Sizes {
    int64_t outer, inner, channels, height, width, count, patch, element_bytes;
    int64_t images_bytes = 0, patches_bytes = 0;  // set by `checked`
};

// In elements; `count` steps between the patches of an image.
struct Strides {
    int64_t outer, inner, count, channel, y, x;
};

bool multiply(std::initializer_list<int64_t> factors, int64_t* product) {
    *product = 1;
    return std::none_of(factors.begin(), factors.end(),
                        [&](int64_t factor) { return __builtin_mul_overflow(*product, factor, product); });
}

// The error code of impossible sizes. Past it, no product or sum of sizes below overflows.
int checked(Sizes& s) {
    if (std::min({s.outer, s.inner, s.channels, s.height, s.width, s.count}) < 0) return ICSEG_NEGATIVE_SIZE;
    if (s.patch < 1) return ICSEG_PATCH_SIZE;
    int64_t coords_bytes, sum;
    const bool fits =
        multiply({s.channels, s.height, s.width, s.element_bytes, s.inner, s.outer}, &s.images_bytes) &&
        multiply({s.channels, s.patch, s.patch, s.element_bytes, s.count, s.inner, s.outer}, &s.patches_bytes) &&
        multiply({s.count, 2, sizeof(int64_t), s.inner, s.outer}, &coords_bytes) &&
        !__builtin_add_overflow(s.images_bytes, s.patches_bytes, &sum) &&
        !__builtin_add_overflow(std::max(s.height, s.width), s.patch, &sum);
    return fits ? ICSEG_OK : ICSEG_TOO_LARGE;
}

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

template <typename Element>
int gather(const Element* source, const int64_t* coords, Element* patches, const Sizes& s, const Strides& stride) {
    const int64_t elements = s.channels * s.patch * s.patch;
    const int64_t total = elements ? s.count * s.inner * s.outer : 0;
#pragma omp parallel for schedule(static) if (s.patches_bytes > kParallelBytes)
    for (int64_t n = 0; n < total; ++n) {
        const int64_t image = n / s.count;
        const Element* from = source + (image / s.inner) * stride.outer + (image % s.inner) * stride.inner;
        Element* to = patches + n * elements;
        const Span y(coords[2 * n], s.patch, s.height), x(coords[2 * n + 1], s.patch, s.width);
        if (y.empty() || x.empty()) {
            std::memset(to, 0, elements * sizeof(Element));
            continue;
        }
        for (int64_t c = 0; c < s.channels; ++c, from += stride.channel) {
            for (int64_t i = 0; i < s.patch; ++i, to += s.patch) {
                if (!y.contains(i)) {
                    std::memset(to, 0, s.patch * sizeof(Element));
                    continue;
                }
                std::memset(to, 0, x.first * sizeof(Element));
                copy_row(from + (y.corner + i) * stride.y + (x.corner + x.first) * stride.x, stride.x,
                         x.last - x.first, to + x.first);
                std::memset(to + x.last, 0, (s.patch - x.last) * sizeof(Element));
            }
        }
    }
    return ICSEG_OK;
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
int gather_backward(const Real* patches, const int64_t* coords, Real* images, Sizes s, const Strides& stride) {
    if (const int code = checked(s)) return code;
    const int64_t bands = s.height / kBandRows + (s.height % kBandRows != 0);
    const int64_t total = s.width ? s.channels * bands * s.inner * s.outer : 0;
#pragma omp parallel for schedule(static) if (s.images_bytes + s.patches_bytes > kParallelBytes)
    for (int64_t n = 0; n < total; ++n) {
        const int64_t plane = n / bands, image = plane / s.channels;
        const int64_t top = n % bands * kBandRows, bottom = std::min(top + kBandRows, s.height);
        const Real* from = patches + (image / s.inner) * stride.outer + (image % s.inner) * stride.inner +
                           (plane % s.channels) * stride.channel;
        Real* to = images + plane * s.height * s.width;
        std::memset(to + top * s.width, 0, (bottom - top) * s.width * sizeof(Real));
        for (int64_t k = 0; k < s.count; ++k, from += stride.count) {
            const int64_t* corner = coords + 2 * (image * s.count + k);
            const Span y(corner[0], s.patch, s.height), x(corner[1], s.patch, s.width);
            const int64_t last = std::min(y.corner + y.last, bottom);
            for (int64_t row = std::max(y.corner + y.first, top); row < last; ++row) {
                add_row(from + (row - y.corner) * stride.y + x.first * stride.x, stride.x, x.last - x.first,
                        to + row * s.width + x.corner + x.first);
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
    Sizes sizes{outer, inner, channels, height, width, count, patch, element_bytes};
    if (const int code = checked(sizes)) return code;
    const auto run = [&](auto element) {
        using Element = decltype(element);
        return gather(static_cast<const Element*>(source), coords, static_cast<Element*>(patches), sizes,
                      {stride_outer, stride_inner, 0, stride_channel, stride_y, stride_x});
    };
    switch (element_bytes) {
        case 1: return run(uint8_t());
        case 2: return run(uint16_t());
        case 4: return run(uint32_t());
        case 8: return run(uint64_t());
        default: return ICSEG_ELEMENT_BYTES;
    }
}

int icseg_gather_patches_backward_f32(const float* patches, const int64_t* coords, float* images,
                                      int64_t outer, int64_t inner, int64_t count, int64_t channels,
                                      int64_t patch, int64_t height, int64_t width,
                                      int64_t stride_outer, int64_t stride_inner, int64_t stride_count,
                                      int64_t stride_channel, int64_t stride_y, int64_t stride_x) {
    return gather_backward(patches, coords, images,
                           {outer, inner, channels, height, width, count, patch, sizeof(float)},
                           {stride_outer, stride_inner, stride_count, stride_channel, stride_y, stride_x});
}

int icseg_gather_patches_backward_f64(const double* patches, const int64_t* coords, double* images,
                                      int64_t outer, int64_t inner, int64_t count, int64_t channels,
                                      int64_t patch, int64_t height, int64_t width,
                                      int64_t stride_outer, int64_t stride_inner, int64_t stride_count,
                                      int64_t stride_channel, int64_t stride_y, int64_t stride_x) {
    return gather_backward(patches, coords, images,
                           {outer, inner, channels, height, width, count, patch, sizeof(double)},
                           {stride_outer, stride_inner, stride_count, stride_channel, stride_y, stride_x});
}
