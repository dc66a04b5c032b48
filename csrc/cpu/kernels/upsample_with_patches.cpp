// upsample_with_patches: a band of rows of the larger map, then the patches' parts in it while it is in the cache.
#include "upsample_with_patches.h"

#include "../parallel.h"
#include "simd.h"
#include "span.h"

namespace icseg {
namespace ICSEG_ISA {
namespace {

// A band has as many rows as fit here.
constexpr int64_t kBandBytes = 256 * 1024;

template <typename Number>
inline Number between(Number near, Number far) {
    return fma(near, Number{} + 0.75f, far * 0.25f);
}

// A row of the larger map, between two rows of the coarser one, of `coarse` pixels each.
inline void blend_row(const float* near, const float* far, int64_t coarse, float* to, int64_t width) {
    const auto pixel = [&](int64_t x) { return between(near[x], far[x]); };
    const auto pixels = [&](int64_t x) ICSEG_INLINE { return between(load(near + x), load(far + x)); };
    const auto both = [&](int64_t x) {
        const float here = pixel(x);
        to[2 * x] = between(here, pixel(larger<int64_t>(x - 1, 0)));
        if (2 * x + 1 < width) to[2 * x + 1] = between(here, pixel(smaller(x + 1, coarse - 1)));
    };
    both(0);
    int64_t x = 1;
    for (; x + kLanes<float> < coarse; x += kLanes<float>) {
        const Vector<float> here = pixels(x);
        Vector<float> first, second;
        interleave<float>(between(here, pixels(x - 1)), between(here, pixels(x + 1)), first, second);
        store(to + 2 * x, first);
        store(to + 2 * x + kLanes<float>, second);
    }
    for (; x < coarse; ++x) both(x);
}

inline void copy_row(const float* from, float* to, int64_t count) {
    int64_t x = 0;
    for (; x + kLanes<float> <= count; x += kLanes<float>) store(to + x, load(from + x));
    if (x < count) store_first(to + x, load_first(from + x, count - x), count - x);
}

}  // namespace

void upsample_with_patches(const UpsampleWithPatches& call) {
    const int64_t height = call.height, width = call.width, row_bytes = width * static_cast<int64_t>(sizeof(float));
    const int64_t band_rows = larger<int64_t>(kBandBytes / row_bytes, 8);
    const int64_t bands = (height - 1) / band_rows + 1, area = call.patch_height * call.patch_width;
    parallel_for(call.planes * bands, call.planes * height * row_bytes, [&](int64_t i) {
        const int64_t plane = i / bands, top = i % bands * band_rows, bottom = smaller(top + band_rows, height);
        const int64_t batch = plane / call.channels, channel = plane % call.channels;
        const float* const from = call.coarser + batch * call.stride_batch + channel * call.stride_channel;
        float* const to = call.out + plane * height * width;
        for (int64_t y = top; y < bottom; ++y) {
            const int64_t near = y / 2;
            const int64_t far = y % 2 ? smaller(near + 1, call.coarse_height - 1) : larger<int64_t>(near - 1, 0);
            blend_row(from + near * call.stride_y, from + far * call.stride_y, call.coarse_width, to + y * width,
                      width);
        }
        for (int64_t k = 0; k < call.count; ++k) {
            const int64_t entry = batch * call.count + k;
            const Span rows(call.coords[2 * entry], call.patch_height, height);
            const Span columns(call.coords[2 * entry + 1], call.patch_width, width);
            const int64_t first = larger(rows.corner + rows.first, top);
            const int64_t last = smaller(rows.corner + rows.last, bottom);
            if (columns.empty() || first >= last) continue;
            const float* const patch = call.patches + (entry * call.channels + channel) * area + columns.first;
            for (int64_t y = first; y < last; ++y) {
                copy_row(patch + (y - rows.corner) * call.patch_width, to + y * width + columns.corner + columns.first,
                         columns.last - columns.first);
            }
        }
    });
}

}  // namespace ICSEG_ISA
}  // namespace icseg
