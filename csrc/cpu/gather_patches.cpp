// gather_patches: an exact copy of patches, their resampling, and the adjoints of both.
#include "kernels/gather_patches.h"

#include "checks.h"
#include "pages.h"

namespace icseg {
namespace {

// Fills in the bytes; an error code if sizes are impossible. Past it, no product or sum of sizes overflows.
int checked(GatherSizes& s, int64_t element_bytes, int coords_type, int last_type) {
    if (any_negative({s.outer, s.inner, s.channels, s.height, s.width, s.count})) return ICSEG_NEGATIVE_SIZE;
    if (s.patch < 1) return ICSEG_PATCH_SIZE;
    if (coords_type < ICSEG_COORDS_INT32 || coords_type > last_type) return ICSEG_COORDS_TYPE;
    int64_t coords_bytes, sum;
    const bool fits =
        multiply({s.channels, s.height, s.width, element_bytes, s.inner, s.outer}, &s.images_bytes) &&
        multiply({s.patch, s.patch, element_bytes, s.channels, s.count, s.inner, s.outer}, &s.patches_bytes) &&
        multiply({s.count, 2, sizeof(int64_t), s.inner, s.outer}, &coords_bytes) &&
        !__builtin_add_overflow(s.images_bytes, s.patches_bytes, &sum) &&
        !__builtin_add_overflow(std::max(s.height, s.width), s.patch, &sum);
    return fits ? ICSEG_OK : ICSEG_TOO_LARGE;
}

template <typename Real>
int backward(const Real* patches, const GatherCoords& coords, Real* images, GatherSizes sizes,
             const GatherStrides& strides) {
    if (const int code = checked(sizes, sizeof(Real), coords.type, ICSEG_COORDS_INT64)) return code;
    expect_writes(images, sizes.images_bytes);
    ICSEG_CHOSEN(gather_backward<Real>)(patches, coords, images, sizes, strides);
    return ICSEG_OK;
}

template <typename Real>
int bilinear(const Real* source, const GatherCoords& coords, Real* patches, GatherSizes sizes,
             const GatherStrides& strides, const GatherGrid& grid) {
    if (const int code = checked(sizes, sizeof(Real), coords.type, ICSEG_COORDS_FLOAT64)) return code;
    expect_writes(patches, sizes.patches_bytes);
    ICSEG_CHOSEN(gather_bilinear<Real>)(source, coords, patches, sizes, strides, grid);
    return ICSEG_OK;
}

template <typename Real>
int bilinear_backward(const Real* patches, const GatherCoords& coords, Real* images, GatherSizes sizes,
                      const GatherStrides& strides, const GatherGrid& grid) {
    if (const int code = checked(sizes, sizeof(Real), coords.type, ICSEG_COORDS_FLOAT64)) return code;
    expect_writes(images, sizes.images_bytes);
    ICSEG_CHOSEN(gather_bilinear_backward<Real>)(patches, coords, images, sizes, strides, grid);
    return ICSEG_OK;
}

}  // namespace
}  // namespace icseg

int icseg_gather_patches(const void* source, const void* coords, void* patches,
                         int64_t outer, int64_t inner, int64_t channels, int64_t height, int64_t width,
                         int64_t count, int64_t patch,
                         int64_t stride_outer, int64_t stride_inner, int64_t stride_channel,
                         int64_t stride_y, int64_t stride_x, int64_t element_bytes, int coords_type) {
    using namespace icseg;
    GatherSizes sizes{outer, inner, channels, height, width, count, patch, 0, 0};
    if (const int code = checked(sizes, element_bytes, coords_type, ICSEG_COORDS_INT64)) return code;
    const GatherStrides strides{stride_outer, stride_inner, 0, stride_channel, stride_y, stride_x};
    const auto run = [&](auto element) {
        using Element = decltype(element);
        expect_writes(patches, sizes.patches_bytes);
        ICSEG_CHOSEN(gather<Element>)
        (static_cast<const Element*>(source), {coords, coords_type}, static_cast<Element*>(patches), sizes, strides);
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

int icseg_gather_patches_backward_f32(const float* patches, const void* coords, float* images,
                                      int64_t outer, int64_t inner, int64_t count, int64_t channels,
                                      int64_t patch, int64_t height, int64_t width,
                                      int64_t stride_outer, int64_t stride_inner, int64_t stride_count,
                                      int64_t stride_channel, int64_t stride_y, int64_t stride_x, int coords_type) {
    return icseg::backward(patches, {coords, coords_type}, images,
                           {outer, inner, channels, height, width, count, patch, 0, 0},
                           {stride_outer, stride_inner, stride_count, stride_channel, stride_y, stride_x});
}

int icseg_gather_patches_backward_f64(const double* patches, const void* coords, double* images,
                                      int64_t outer, int64_t inner, int64_t count, int64_t channels,
                                      int64_t patch, int64_t height, int64_t width,
                                      int64_t stride_outer, int64_t stride_inner, int64_t stride_count,
                                      int64_t stride_channel, int64_t stride_y, int64_t stride_x, int coords_type) {
    return icseg::backward(patches, {coords, coords_type}, images,
                           {outer, inner, channels, height, width, count, patch, 0, 0},
                           {stride_outer, stride_inner, stride_count, stride_channel, stride_y, stride_x});
}

int icseg_gather_patches_bilinear_f32(const float* source, const void* coords, float* patches,
                                      int64_t outer, int64_t inner, int64_t channels, int64_t height, int64_t width,
                                      int64_t count, int64_t samples,
                                      int64_t stride_outer, int64_t stride_inner, int64_t stride_channel,
                                      int64_t stride_y, int64_t stride_x, int coords_type,
                                      double extent_y, double extent_x, int edge_to_edge) {
    return icseg::bilinear(source, {coords, coords_type}, patches,
                           {outer, inner, channels, height, width, count, samples, 0, 0},
                           {stride_outer, stride_inner, 0, stride_channel, stride_y, stride_x},
                           {extent_y, extent_x, edge_to_edge != 0});
}

int icseg_gather_patches_bilinear_f64(const double* source, const void* coords, double* patches,
                                      int64_t outer, int64_t inner, int64_t channels, int64_t height, int64_t width,
                                      int64_t count, int64_t samples,
                                      int64_t stride_outer, int64_t stride_inner, int64_t stride_channel,
                                      int64_t stride_y, int64_t stride_x, int coords_type,
                                      double extent_y, double extent_x, int edge_to_edge) {
    return icseg::bilinear(source, {coords, coords_type}, patches,
                           {outer, inner, channels, height, width, count, samples, 0, 0},
                           {stride_outer, stride_inner, 0, stride_channel, stride_y, stride_x},
                           {extent_y, extent_x, edge_to_edge != 0});
}

int icseg_gather_patches_bilinear_backward_f32(
    const float* patches, const void* coords, float* images, int64_t outer, int64_t inner, int64_t count,
    int64_t channels, int64_t samples, int64_t height, int64_t width, int64_t stride_outer, int64_t stride_inner,
    int64_t stride_count, int64_t stride_channel, int64_t stride_y, int64_t stride_x, int coords_type,
    double extent_y, double extent_x, int edge_to_edge) {
    return icseg::bilinear_backward(patches, {coords, coords_type}, images,
                                    {outer, inner, channels, height, width, count, samples, 0, 0},
                                    {stride_outer, stride_inner, stride_count, stride_channel, stride_y, stride_x},
                                    {extent_y, extent_x, edge_to_edge != 0});
}

int icseg_gather_patches_bilinear_backward_f64(
    const double* patches, const void* coords, double* images, int64_t outer, int64_t inner, int64_t count,
    int64_t channels, int64_t samples, int64_t height, int64_t width, int64_t stride_outer, int64_t stride_inner,
    int64_t stride_count, int64_t stride_channel, int64_t stride_y, int64_t stride_x, int coords_type,
    double extent_y, double extent_x, int edge_to_edge) {
    return icseg::bilinear_backward(patches, {coords, coords_type}, images,
                                    {outer, inner, channels, height, width, count, samples, 0, 0},
                                    {stride_outer, stride_inner, stride_count, stride_channel, stride_y, stride_x},
                                    {extent_y, extent_x, edge_to_edge != 0});
}
