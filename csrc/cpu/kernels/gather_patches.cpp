#include "gather_patches.h"

#include "../parallel.h"
#include "simd.h"
#include "span.h"

namespace icseg {
namespace ICSEG_ISA {
namespace {

constexpr int64_t kBandRows = 64;

template <typename Element>
inline void copy_row(const Element* from, int64_t stride, int64_t length, Element* to) {
    if (stride == 1) {
        std::memcpy(to, from, length * sizeof(Element));
        return;
    }
    for (int64_t i = 0; i < length; ++i) to[i] = from[i * stride];
}

template <typename Real>
inline void add_row(const Real* from, int64_t stride, int64_t length, Real* to) {
    if (stride == 1) {
        for (int64_t i = 0; i < length; ++i) to[i] += from[i];
        return;
    }
    for (int64_t i = 0; i < length; ++i) to[i] += from[i * stride];
}

}  // namespace

template <typename Element>
void gather(const Element* source, const int64_t* coords, Element* patches, const GatherSizes& s,
            const GatherStrides& stride) {
    const int64_t elements = s.channels * s.patch * s.patch;
    const int64_t total = elements ? s.count * s.inner * s.outer : 0;
    parallel_for(total, s.patches_bytes, [&](int64_t n) {
        const int64_t image = n / s.count;
        const Element* from = source + (image / s.inner) * stride.outer + (image % s.inner) * stride.inner;
        Element* to = patches + n * elements;
        const Span y(coords[2 * n], s.patch, s.height), x(coords[2 * n + 1], s.patch, s.width);
        if (y.empty() || x.empty()) {
            std::memset(to, 0, elements * sizeof(Element));
            return;
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
    });
}

// Output-centric: each band of rows of a plane belongs to one thread, which adds the patches in order.
template <typename Real>
void gather_backward(const Real* patches, const int64_t* coords, Real* images, const GatherSizes& s,
                     const GatherStrides& stride) {
    const int64_t bands = s.height / kBandRows + (s.height % kBandRows != 0);
    const int64_t total = s.width ? s.channels * bands * s.inner * s.outer : 0;
    parallel_for(total, s.images_bytes + s.patches_bytes, [&](int64_t n) {
        const int64_t plane = n / bands, image = plane / s.channels;
        const int64_t top = n % bands * kBandRows, bottom = smaller(top + kBandRows, s.height);
        const Real* from = patches + (image / s.inner) * stride.outer + (image % s.inner) * stride.inner +
                           (plane % s.channels) * stride.channel;
        Real* to = images + plane * s.height * s.width;
        std::memset(to + top * s.width, 0, (bottom - top) * s.width * sizeof(Real));
        for (int64_t k = 0; k < s.count; ++k, from += stride.count) {
            const int64_t* corner = coords + 2 * (image * s.count + k);
            const Span y(corner[0], s.patch, s.height), x(corner[1], s.patch, s.width);
            const int64_t last = smaller(y.corner + y.last, bottom);
            for (int64_t row = larger(y.corner + y.first, top); row < last; ++row) {
                add_row(from + (row - y.corner) * stride.y + x.first * stride.x, stride.x, x.last - x.first,
                        to + row * s.width + x.corner + x.first);
            }
        }
    });
}

#define ICSEG_GATHER(Element) \
    template void gather<Element>(const Element*, const int64_t*, Element*, const GatherSizes&, const GatherStrides&);
ICSEG_GATHER(uint8_t)
ICSEG_GATHER(uint16_t)
ICSEG_GATHER(uint32_t)
ICSEG_GATHER(uint64_t)

#define ICSEG_GATHER_BACKWARD(Real)                                                                \
    template void gather_backward<Real>(const Real*, const int64_t*, Real*, const GatherSizes&, \
                                        const GatherStrides&);
ICSEG_GATHER_BACKWARD(float)
ICSEG_GATHER_BACKWARD(double)

}  // namespace ICSEG_ISA
}  // namespace icseg
