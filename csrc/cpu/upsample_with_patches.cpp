// upsample_with_patches: a map at twice its size, with patches in place of what lies under them.
#include "kernels/upsample_with_patches.h"

#include "checks.h"
#include "pages.h"

namespace icseg {
namespace {

bool doubled(int64_t length, int64_t coarse) { return length / 2 + length % 2 == coarse; }

}  // namespace
}  // namespace icseg

int icseg_upsample_with_patches_f32(const float* coarser, const float* patches, const int64_t* coords, float* out,
                                    int64_t batch, int64_t channels, int64_t coarse_height, int64_t coarse_width,
                                    int64_t height, int64_t width, int64_t count, int64_t patch_height,
                                    int64_t patch_width, int64_t stride_batch, int64_t stride_channel,
                                    int64_t stride_y) {
    using namespace icseg;
    if (any_negative({batch, channels, coarse_height, coarse_width, height, width, count})) return ICSEG_NEGATIVE_SIZE;
    if (patch_height < 1 || patch_width < 1) return ICSEG_PATCH_SIZE;
    if (!doubled(height, coarse_height) || !doubled(width, coarse_width)) return ICSEG_DOUBLE;
    int64_t planes, bytes, others;
    if (!multiply({batch, channels}, &planes) || !multiply({sizeof(float), height, width, planes}, &bytes) ||
        !multiply({2 * sizeof(int64_t), batch, count}, &others) ||
        !multiply({sizeof(float), patch_height, patch_width, planes, count}, &others)) {
        return ICSEG_TOO_LARGE;
    }
    if (bytes == 0) return ICSEG_OK;
    expect_writes(out, bytes);
    ICSEG_CHOSEN(upsample_with_patches)({coarser, patches, coords, out, channels, planes, coarse_height, coarse_width,
                                         height, width, count, patch_height, patch_width, stride_batch, stride_channel,
                                         stride_y});
    return ICSEG_OK;
}
