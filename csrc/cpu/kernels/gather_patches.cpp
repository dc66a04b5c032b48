// The copy, and its adjoint.
#include "gather_patches.h"

#include "gather_work.h"
#include "simd.h"
#include "span.h"
#include "transpose.h"

namespace icseg {
namespace ICSEG_ISA {
namespace {

template <int kBytes>
inline void copy_chunk(const uint8_t* from, uint8_t* to) {
    put<kBytes>(to, get<kBytes>(from));
}

// Rows of one chunk of kBytes, or of at least that many bytes: then the last chunk overlaps the one before.
template <int kBytes>
inline void copy_rows(const uint8_t* from, int64_t from_pitch, uint8_t* to, int64_t to_pitch, int64_t rows,
                      int64_t bytes) {
    if (bytes == kBytes) {
        for (int64_t i = 0; i < rows; ++i) copy_chunk<kBytes>(from + i * from_pitch, to + i * to_pitch);
    } else if (bytes == 2 * kBytes) {
        for (int64_t i = 0; i < rows; ++i) {
            copy_chunk<kBytes>(from + i * from_pitch, to + i * to_pitch);
            copy_chunk<kBytes>(from + i * from_pitch + kBytes, to + i * to_pitch + kBytes);
        }
    } else {
        const int64_t last = bytes - kBytes;
        for (int64_t i = 0; i < rows; ++i, from += from_pitch, to += to_pitch) {
            for (int64_t b = 0; b < last; b += kBytes) copy_chunk<kBytes>(from + b, to + b);
            copy_chunk<kBytes>(from + last, to + last);
        }
    }
}

// A rectangle of rows of contiguous bytes.
inline void copy_rectangle(const uint8_t* from, int64_t from_pitch, uint8_t* to, int64_t to_pitch, int64_t rows,
                           int64_t bytes) {
    constexpr int kNext = kVectorBytes >= 32 ? 32 : 16;
    if (bytes >= kVectorBytes) {
        copy_rows<kVectorBytes>(from, from_pitch, to, to_pitch, rows, bytes);
    } else if (bytes >= kNext) {
        copy_rows<kNext>(from, from_pitch, to, to_pitch, rows, bytes);
    } else if (bytes >= 16) {
        copy_rows<16>(from, from_pitch, to, to_pitch, rows, bytes);
    } else if (bytes >= 8) {
        copy_rows<8>(from, from_pitch, to, to_pitch, rows, bytes);
    } else if (bytes >= 4) {
        copy_rows<4>(from, from_pitch, to, to_pitch, rows, bytes);
    } else {
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t b = 0; b < bytes; ++b) to[i * to_pitch + b] = from[i * from_pitch + b];
        }
    }
}

// to[c][i][j] = from[c][i][j], `to` in patches of `patch` pixels a side.
template <typename Element>
inline void copy_box(const Element* from, const GatherStrides& stride, Element* to, int64_t patch, int64_t channels,
                     int64_t rows, int64_t columns) {
    constexpr int64_t kBytes = sizeof(Element);
    const int64_t plane = patch * patch;
    if (stride.x == 1) {
        for (int64_t c = 0; c < channels; ++c, from += stride.channel, to += plane) {
            copy_rectangle(reinterpret_cast<const uint8_t*>(from), stride.y * kBytes, reinterpret_cast<uint8_t*>(to),
                           patch * kBytes, rows, columns * kBytes);
        }
    } else if (stride.channel == 1) {
        for (int64_t i = 0; i < rows; ++i) {
            transpose(from + i * stride.y, stride.x, to + i * patch, plane, columns, channels);
        }
    } else {
        for (int64_t c = 0; c < channels; ++c, from += stride.channel, to += plane) {
            if (stride.y == 1) {
                transpose(from, stride.x, to, patch, columns, rows);
                continue;
            }
            for (int64_t i = 0; i < rows; ++i) {
                for (int64_t j = 0; j < columns; ++j) to[i * patch + j] = from[i * stride.y + j * stride.x];
            }
        }
    }
}

// to[j] += from[j] for the next `kCount` elements as often as they fit.
template <int kCount, typename Real>
inline void add_chunks(const Real* from, Real* to, int64_t length, int64_t& j) {
    if constexpr (kCount <= kLanes<Real>) {
        for (; j + kCount <= length; j += kCount) put<kCount>(to + j, get<kCount>(to + j) + get<kCount>(from + j));
    }
}

template <typename Real>
inline void add_row(const Real* from, Real* to, int64_t length) {
    int64_t j = 0;
    add_chunks<16>(from, to, length, j);
    add_chunks<8>(from, to, length, j);
    add_chunks<4>(from, to, length, j);
    add_chunks<2>(from, to, length, j);
    if (j < length) to[j] += from[j];
}

// What a patch adds to a band of rows: a box in the patch, and where it comes to lie.
struct Box {
    int64_t from, to, rows, columns;
};

template <typename Real>
inline void add_box(const Real* from, const GatherStrides& stride, Real* to, int64_t pitch, const Box& box) {
    from += box.from, to += box.to;
    if (stride.x != 1) {
        for (int64_t i = 0; i < box.rows; ++i) {
            for (int64_t j = 0; j < box.columns; ++j) to[i * pitch + j] += from[i * stride.y + j * stride.x];
        }
        return;
    }
    for (int64_t i = 0; i < box.rows; ++i) add_row(from + i * stride.y, to + i * pitch, box.columns);
}

}  // namespace

template <typename Element>
void gather(const Element* source, const GatherCoords& coords, Element* patches, const GatherSizes& s,
            const GatherStrides& stride) {
    const int64_t plane = s.patch * s.patch;
    const int64_t bytes = s.patches_bytes;
    for_blocks(s, sizeof(Element), bytes, [&](int64_t image, int64_t k, int64_t last_k, int64_t c, int64_t last_c) {
        const Element* from = source + offset(image, s, stride) + c * stride.channel;
        const int64_t channels = last_c - c;
        for (; k < last_k; ++k) {
            const int64_t n = image * s.count + k;
            Element* to = patches + (n * s.channels + c) * plane;
            const Span y(whole(coords, 2 * n), s.patch, s.height), x(whole(coords, 2 * n + 1), s.patch, s.width);
            const int64_t rows = y.last - y.first, columns = x.last - x.first;
            if (rows < s.patch || columns < s.patch) std::memset(to, 0, channels * plane * sizeof(Element));
            if (y.empty() || x.empty()) continue;
            copy_box(from + (y.corner + y.first) * stride.y + (x.corner + x.first) * stride.x, stride,
                     to + y.first * s.patch + x.first, s.patch, channels, rows, columns);
        }
    });
}

// Output-centric: each band of rows belongs to one thread, which adds the patches in order. Which ones lie in the
// band is found out once for several channels.
template <typename Real>
void gather_backward(const Real* patches, const GatherCoords& coords, Real* images, const GatherSizes& s,
                     const GatherStrides& stride) {
    constexpr int64_t kBoxes = 256;
    const int64_t bytes = s.images_bytes + s.patches_bytes;
    for_bands(s, bytes, [&](int64_t image, int64_t top, int64_t bottom, int64_t first_c, int64_t last_c) {
        const Real* from = patches + offset(image, s, stride);
        Real* band = images + (image * s.channels * s.height + top) * s.width;
        Box boxes[kBoxes];
        int64_t k = 0;
        do {
            const bool fresh = k == 0;
            int64_t found = 0;
            for (; k < s.count && found < kBoxes; ++k) {
                const int64_t n = 2 * (image * s.count + k);
                const Span y(whole(coords, n), s.patch, s.height), x(whole(coords, n + 1), s.patch, s.width);
                const int64_t first = larger(y.corner + y.first, top), last = smaller(y.corner + y.last, bottom);
                if (first >= last || x.empty()) continue;
                boxes[found++] = {k * stride.count + (first - y.corner) * stride.y + x.first * stride.x,
                                  (first - top) * s.width + x.corner + x.first, last - first, x.last - x.first};
            }
            for (int64_t c = first_c; c < last_c; ++c) {
                Real* to = band + c * s.height * s.width;
                if (fresh) std::memset(to, 0, (bottom - top) * s.width * sizeof(Real));
                for (int64_t b = 0; b < found; ++b) add_box(from + c * stride.channel, stride, to, s.width, boxes[b]);
            }
        } while (k < s.count);
    });
}

#define ICSEG_GATHER(Element)                                                                                \
    template void gather<Element>(const Element*, const GatherCoords&, Element*, const GatherSizes&,         \
                                  const GatherStrides&);
ICSEG_GATHER(uint8_t)
ICSEG_GATHER(uint16_t)
ICSEG_GATHER(uint32_t)
ICSEG_GATHER(uint64_t)

#define ICSEG_GATHER_BACKWARD(Real)                                                                          \
    template void gather_backward<Real>(const Real*, const GatherCoords&, Real*, const GatherSizes&,         \
                                        const GatherStrides&);
ICSEG_GATHER_BACKWARD(float)
ICSEG_GATHER_BACKWARD(double)

}  // namespace ICSEG_ISA
}  // namespace icseg
