// gather_patches: an exact copy of patches, and its adjoint.
#include "kernels/gather_patches.h"

#include "checks.h"

namespace icseg {
namespace {

// Fills in the bytes; an error code if sizes are impossible. Past it, no product or sum of sizes overflows.
int checked(GatherSizes& s, int64_t element_bytes) {
    if (any_negative({s.outer, s.inner, s.channels, s.height, s.width, s.count})) return ICSEG_NEGATIVE_SIZE;
    if (s.patch < 1) return ICSEG_PATCH_SIZE;
    int64_t coords_bytes, sum;
    const bool fits =
        multiply({s.channels, s.height, s.width, element_bytes, s.inner, s.outer}, &s.images_bytes) &&
        multiply({s.channels, s.patch, s.patch, element_bytes, s.count, s.inner, s.outer}, &s.patches_bytes) &&
        multiply({s.count, 2, sizeof(int64_t), s.inner, s.outer}, &coords_bytes) &&
        !__builtin_add_overflow(s.images_bytes, s.patches_bytes, &sum) &&
        !__builtin_add_overflow(std::max(s.height, s.width), s.patch, &sum);
    return fits ? ICSEG_OK : ICSEG_TOO_LARGE;
}

template <typename Real>
int gather_backward_checked(const Real* patches, const int64_t* coords, Real* images, GatherSizes sizes,
                            const GatherStrides& strides) {
    if (const int code = checked(sizes, sizeof(Real))) return code;
    ICSEG_CHOSEN(gather_backward<Real>)(patches, coords, images, sizes, strides);
    return ICSEG_OK;
}

}  // namespace
}  // namespace icseg

int icseg_gather_patches(const void* source, const int64_t* coords, void* patches,
                         int64_t outer, int64_t inner, int64_t channels, int64_t height, int64_t width,
                         int64_t count, int64_t patch,
                         int64_t stride_outer, int64_t stride_inner, int64_t stride_channel,
                         int64_t stride_y, int64_t stride_x, int64_t element_bytes) {
    using namespace icseg;
    GatherSizes sizes{outer, inner, channels, height, width, count, patch, 0, 0};
    if (const int code = checked(sizes, element_bytes)) return code;
    const GatherStrides strides{stride_outer, stride_inner, 0, stride_channel, stride_y, stride_x};
    const auto run = [&](auto element) {
        using Element = decltype(element);
        ICSEG_CHOSEN(gather<Element>)
        (static_cast<const Element*>(source), coords, static_cast<Element*>(patches), sizes, strides);
        return ICSEG_OK;
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
    return icseg::gather_backward_checked(
        patches, coords, images, {outer, inner, channels, height, width, count, patch, 0, 0},
        {stride_outer, stride_inner, stride_count, stride_channel, stride_y, stride_x});
}

int icseg_gather_patches_backward_f64(const double* patches, const int64_t* coords, double* images,
                                      int64_t outer, int64_t inner, int64_t count, int64_t channels,
                                      int64_t patch, int64_t height, int64_t width,
                                      int64_t stride_outer, int64_t stride_inner, int64_t stride_count,
                                      int64_t stride_channel, int64_t stride_y, int64_t stride_x) {
    return icseg::gather_backward_checked(
        patches, coords, images, {outer, inner, channels, height, width, count, patch, 0, 0},
        {stride_outer, stride_inner, stride_count, stride_channel, stride_y, stride_x});
}
