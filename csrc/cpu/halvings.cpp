// halvings: an image at half its size, at a quarter, ...
#include "kernels/halvings.h"

#include "checks.h"
#include "pages.h"

int icseg_halvings_f32(const float* image, float* const* means, float* const* deviations, int64_t images,
                       int64_t channels, int64_t height, int64_t width, int64_t count, int64_t deviating,
                       int64_t stride_image, int64_t stride_channel, int64_t stride_y, float* workspace,
                       int64_t workspace_bytes) {
    using namespace icseg;
    if (any_negative({images, channels, height, width, count, deviating})) return ICSEG_NEGATIVE_SIZE;
    if (deviating > count) return ICSEG_HALVINGS;
    int64_t planes, bytes;  // twice those of the image
    if (!multiply({images, channels}, &planes) || !multiply({2 * sizeof(float), height, width, planes}, &bytes)) {
        return ICSEG_TOO_LARGE;
    }
    if (bytes == 0) return ICSEG_OK;
    int64_t squares = 0, rows = height, columns = width;
    for (int64_t i = 0; i < count; ++i) {
        rows = half(rows), columns = half(columns);
        const int64_t elements = planes * rows * columns;
        if (i + 1 >= deviating) break;
        squares += elements;
        if (workspace_bytes / static_cast<int64_t>(sizeof(float)) < squares) return ICSEG_WORKSPACE;
    }
    rows = half(height), columns = half(width);
    if (count > 0) expect_writes(means[0], planes * rows * columns * static_cast<int64_t>(sizeof(float)));
    ICSEG_CHOSEN(halvings)({image, means, deviations, channels, planes, height, width, count, deviating, stride_image,
                            stride_channel, stride_y, workspace});
    return ICSEG_OK;
}
