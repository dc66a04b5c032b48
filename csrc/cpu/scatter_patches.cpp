// scatter_patches: the weighted mean of overlapping patches, and its adjoint.
#include "kernels/scatter_patches.h"

#include "checks.h"
#include "pages.h"

namespace icseg {
namespace {

// Fills in the bytes; an error code if sizes are impossible. Past it, no product or sum of sizes overflows.
int checked(ScatterSizes& s, int64_t element_bytes) {
    if (any_negative({s.batch, s.count, s.channels, s.height, s.width})) return ICSEG_NEGATIVE_SIZE;
    if (s.patch < 1) return ICSEG_PATCH_SIZE;
    int64_t coords_bytes, totals_bytes, patch_bytes, sum;
    const bool fits =
        multiply({s.height, s.width, sizeof(double), s.batch}, &totals_bytes) &&
        multiply({s.height, s.width, element_bytes, s.batch, s.channels}, &s.images_bytes) &&
        multiply({s.patch, s.patch, sizeof(double)}, &patch_bytes) &&
        multiply({s.patch, s.patch, element_bytes, s.channels, s.count, s.batch}, &s.patches_bytes) &&
        multiply({s.count, 2, sizeof(int64_t), s.batch}, &coords_bytes) &&
        !__builtin_add_overflow(s.images_bytes, s.patches_bytes, &sum) &&
        !__builtin_add_overflow(std::max(s.height, s.width), s.patch, &sum);
    return fits ? ICSEG_OK : ICSEG_TOO_LARGE;
}

}  // namespace
}  // namespace icseg

#define ICSEG_SCATTER(name, stored, sum, Stored)                                                                  \
    ICSEG_SCATTER_PATCHES(name, stored, sum) {                                                                    \
        using namespace icseg;                                                                                    \
        ScatterSizes sizes{batch, count, channels, patch, height, width, 0, 0};                                   \
        if (const int code = checked(sizes, sizeof(Stored))) return code;                                         \
        expect_writes(mean, sizes.images_bytes);                                                                  \
        ICSEG_CHOSEN(scatter<Stored>)                                                                             \
        (reinterpret_cast<const Stored*>(patches), Corners{coords, coords_are_32_bits != 0}, weight,              \
         reinterpret_cast<Stored*>(mean), total, coverage, fill, sizes,                                           \
         ScatterStrides{stride_batch, stride_count, stride_channel, stride_y, stride_x});                         \
        return ICSEG_OK;                                                                                          \
    }
ICSEG_SCATTER(icseg_scatter_patches_f32, float, float, float)
ICSEG_SCATTER(icseg_scatter_patches_f64, double, double, double)
ICSEG_SCATTER(icseg_scatter_patches_bf16, uint16_t, float, Bfloat16)

#define ICSEG_SCATTER_BACKWARD(name, stored, sum, Stored)                                                         \
    ICSEG_SCATTER_PATCHES_BACKWARD(name, stored, sum) {                                                           \
        using namespace icseg;                                                                                    \
        ScatterSizes sizes{batch, count, channels, patch, height, width, 0, 0};                                   \
        if (const int code = checked(sizes, sizeof(Stored))) return code;                                         \
        expect_writes(patches, sizes.patches_bytes);                                                              \
        ICSEG_CHOSEN(scatter_backward<Stored>)                                                                    \
        (reinterpret_cast<const Stored*>(grad), total, Corners{coords, coords_are_32_bits != 0}, weight,          \
         reinterpret_cast<Stored*>(patches), sizes,                                                               \
         ScatterStrides{stride_batch, 0, stride_channel, stride_y, stride_x});                                    \
        return ICSEG_OK;                                                                                          \
    }
ICSEG_SCATTER_BACKWARD(icseg_scatter_patches_backward_f32, float, float, float)
ICSEG_SCATTER_BACKWARD(icseg_scatter_patches_backward_f64, double, double, double)
ICSEG_SCATTER_BACKWARD(icseg_scatter_patches_backward_bf16, uint16_t, float, Bfloat16)
