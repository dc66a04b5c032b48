#include "scatter_patches.h"

#include "../parallel.h"
#include "simd.h"
#include "span.h"

namespace {

using icseg::Bfloat16;

// There are no vectors of bfloat16: it is loaded and stored as float.
template <int64_t kCount>
struct SomeOf<Bfloat16, kCount> {};

// bfloat16 is the upper half of a float32.
template <int64_t kCount>
inline Some<float, kCount> get(const Bfloat16* from) {
    const auto bits = get<kCount>(&from->bits);
    return reinterpret_cast<Some<float, kCount>>(__builtin_convertvector(bits, Some<uint32_t, kCount>) << 16);
}
// To the nearest, ties to even; every NaN becomes the same.
template <int64_t kCount>
inline void put(Bfloat16* to, Some<float, kCount> value) {
    const auto bits = reinterpret_cast<Some<uint32_t, kCount>>(value);
    const auto nan = Some<uint32_t, kCount>{} + 0x7fc0;
    const auto upper = value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : nan;
    put<kCount>(&to->bits, __builtin_convertvector(upper, Some<uint16_t, kCount>));
}

}  // namespace

namespace icseg {
namespace ICSEG_ISA {
namespace {

// An image is written in bands of kRows rows. In a band, blocks of kBlock columns that no patch touches are filled;
// runs of the others, at most kColumns wide, are tiles, whose sums stay in the first-level cache.
constexpr int64_t kRows = 16;
constexpr int64_t kBlock = 16;
template <typename Real>
constexpr int64_t kColumns = 512 / static_cast<int64_t>(sizeof(Real));
// Patches of a fixed size are added with whole rows, also where they hang over the sides of a tile.
constexpr int64_t kMargin = 16;
template <typename Real>
constexpr int64_t kPitch = kColumns<Real> + 2 * kMargin;
// A band of a wider image is divided: it stays in the second-level cache, with all of its channels.
constexpr int64_t kBandColumns = 4096;
constexpr int64_t kBandBlocks = kBandColumns / kBlock;
constexpr int64_t kBandBytes = 256 * 1024;

// How many patches of a band, and of a tile, are listed. If there are more, all are tested again and again.
constexpr int64_t kCandidates = 512;
constexpr int64_t kHits = 128;

template <int64_t kCount>
struct Step {
    static constexpr int64_t count = kCount;
};

// body(i, Step) for first <= i < last: in whole vectors, if allowed, and one by one.
template <typename Real, typename Body>
inline void in_steps(int64_t first, int64_t last, bool vectors, const Body& body) {
    int64_t i = first;
    if (vectors) {
        for (; i + kLanes<Real> <= last; i += kLanes<Real>) body(i, Step<kLanes<Real>>());
    }
    for (; i < last; ++i) body(i, Step<1>());
}

// The same for kPatch elements that start at 0, without a test.
template <typename Real, int64_t kPatch, typename Body>
inline void in_fixed_steps(const Body& body) {
    constexpr int64_t kStep = kPatch < kLanes<Real> ? kPatch : kLanes<Real>;
    for (int64_t i = 0; i < kPatch; i += kStep) body(i, Step<kStep>());
}

// least <= value < end, in one comparison.
inline bool lies_in(int64_t value, int64_t least, int64_t end) {
    return static_cast<uint64_t>(value) - static_cast<uint64_t>(least) < static_cast<uint64_t>(end - least);
}

// Of an image: a band, a tile, or a part of a band that no patch touches.
struct Area {
    int64_t top, left, rows, columns;

    bool is_touched(int64_t y, int64_t x, int64_t patch) const {
        return lies_in(y, top - patch + 1, top + rows) & lies_in(x, left - patch + 1, left + columns);
    }
};

inline int64_t coordinate(const Corners& corners, int64_t i) {
    return corners.narrow ? static_cast<const int32_t*>(corners.values)[i]
                          : static_cast<const int64_t*>(corners.values)[i];
}

// Without the first `skipped` coordinates.
inline Corners rest(const Corners& corners, int64_t skipped) {
    const int64_t bytes = skipped * static_cast<int64_t>(corners.narrow ? sizeof(int32_t) : sizeof(int64_t));
    return {static_cast<const char*>(corners.values) + bytes, corners.narrow};
}

// A patch that touches a tile: its number, and its corner as seen from the tile's.
struct Hit {
    int64_t index, y, x;
};

// Which patches touch a band, in their order, and which of its blocks they touch.
struct Candidates {
    Corners corners;
    int64_t patch;
    int64_t listed[kCandidates];
    bool touched[kBandBlocks];
    int64_t count, blocks;  // of candidates, and of blocks touched
    bool all;  // too many to list: every patch is a candidate, and every block counts as touched

    Candidates(Corners those, int64_t patches, int64_t size, const Area& band)
        : corners(those), patch(size), count(0), blocks(0), all(false) {
        std::memset(touched, 0, sizeof touched);
        for (int64_t k = 0; k < patches; ++k) {
            const int64_t y = coordinate(corners, 2 * k), x = coordinate(corners, 2 * k + 1);
            if (!band.is_touched(y, x, patch)) continue;
            if (count == kCandidates) {
                all = true;
                count = patches;
                blocks = kBandBlocks;
                std::memset(touched, 1, sizeof touched);
                return;
            }
            listed[count++] = k;
            const int64_t start = x - band.left;
            const int64_t last = (smaller(start + patch, band.columns) - 1) / kBlock;
            for (int64_t block = larger<int64_t>(start, 0) / kBlock; block <= last; ++block) {
                blocks += !touched[block];
                touched[block] = true;
            }
        }
    }
};

struct Hits {
    Hit listed[kHits];
    int64_t count;

    // Lists those of the candidates from `next` on, as many as fit. Returns the first that was not tested.
    int64_t find(const Candidates& candidates, int64_t next, const Area& tile) {
        for (count = 0; next < candidates.count && count < kHits; ++next) {
            const int64_t k = candidates.all ? next : candidates.listed[next];
            const Corners& corners = candidates.corners;
            const int64_t y = coordinate(corners, 2 * k), x = coordinate(corners, 2 * k + 1);
            if (tile.is_touched(y, x, candidates.patch)) listed[count++] = {k, y - tile.top, x - tile.left};
        }
        return next;
    }
};

// body(row, column, Step) over an area, row by row.
template <typename Real, typename Body>
inline void each_pixel(const Area& area, const Body& body) {
    const int64_t rows = area.rows, columns = area.columns;
    for (int64_t r = 0; r < rows; ++r) {
        in_steps<Real>(0, columns, true, [&](int64_t j, auto step) { body(r, j, step); });
    }
}

// sums += term(i, j, Step) over the pixels (i, j) of a patch that lie in the tile. kPatch: its size, 0 if any.
template <typename Real, int64_t kPatch, typename Term>
inline void add_patch(const Hit& hit, const Area& tile, int64_t patch, bool vectors, Real* sums, const Term& term) {
    const int64_t first = larger<int64_t>(0, -hit.y), last = smaller(patch, tile.rows - hit.y);
    const int64_t start = larger<int64_t>(0, -hit.x), end = smaller(patch, tile.columns - hit.x);
    Real* to = sums + (hit.y + first) * kPitch<Real> + kMargin + hit.x;
    for (int64_t i = first; i < last; ++i, to += kPitch<Real>) {
        const auto add = [&](int64_t j, auto step) {
            constexpr int64_t kStep = decltype(step)::count;
            put<kStep>(to + j, get<kStep>(to + j) + term(i, j, step));
        };
        if constexpr (kPatch > 0) {
            in_fixed_steps<Real, kPatch>(add);
        } else {
            in_steps<Real>(start, end, vectors, add);
        }
    }
}

template <typename Real>
inline void clear(const Area& tile, Real* sums) {
    const int64_t rows = tile.rows, columns = tile.columns + 2 * kMargin;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < columns; j += kBlock) {
            in_fixed_steps<Real, kBlock>([&](int64_t n, auto step) {
                constexpr int64_t kStep = decltype(step)::count;
                put<kStep>(sums + r * kPitch<Real> + j + n, Some<Real, kStep>{});
            });
        }
    }
}

// Everything of a call, pointers moved to one image.
template <typename Stored>
struct Image {
    using Real = Sum<Stored>;

    const Stored* patches;
    Corners corners;
    const Real* weight;
    Stored* mean;
    Real* total;
    uint8_t* coverage;
    Real fill;
    const ScatterSizes& s;
    const ScatterStrides& stride;

    void write_totals(const Area& tile, const Real* totals) const {
        const int64_t width = s.width, start = tile.top * width + tile.left;
        uint8_t* const covered = coverage + start;
        each_pixel<Real>(tile, [&](int64_t r, int64_t j, auto step) {
            constexpr int64_t kStep = decltype(step)::count;
            const auto positive = get<kStep>(totals + r * kPitch<Real> + kMargin + j) > 0;
            put<kStep>(covered + r * width + j, __builtin_convertvector(positive, Some<uint8_t, kStep>) & 1);
        });
        if (total == nullptr) return;
        Real* const to = total + start;
        each_pixel<Real>(tile, [&](int64_t r, int64_t j, auto step) {
            constexpr int64_t kStep = decltype(step)::count;
            put<kStep>(to + r * width + j, get<kStep>(totals + r * kPitch<Real> + kMargin + j));
        });
    }

    void write_means(const Area& tile, const Real* totals, const Real* sums, Stored* plane) const {
        const int64_t width = s.width;
        const Real otherwise = fill;
        Stored* const to = plane + tile.top * width + tile.left;
        each_pixel<Real>(tile, [&](int64_t r, int64_t j, auto step) {
            constexpr int64_t kStep = decltype(step)::count;
            const auto divisor = get<kStep>(totals + r * kPitch<Real> + kMargin + j);
            const auto quotient = get<kStep>(sums + r * kPitch<Real> + kMargin + j) / divisor;
            put<kStep>(to + r * width + j, divisor > 0 ? quotient : Some<Real, kStep>{} + otherwise);
        });
    }

    void write_empty(const Area& area) const {
        const int64_t width = s.width, start = area.top * width + area.left;
        const Real otherwise = fill;
        uint8_t* const covered = coverage + start;
        each_pixel<Real>(area, [&](int64_t r, int64_t j, auto step) {
            constexpr int64_t kStep = decltype(step)::count;
            put<kStep>(covered + r * width + j, Some<uint8_t, kStep>{});
        });
        for (int64_t c = 0; c < s.channels; ++c) {
            Stored* const to = mean + c * s.height * width + start;
            each_pixel<Real>(area, [&](int64_t r, int64_t j, auto step) {
                constexpr int64_t kStep = decltype(step)::count;
                put<kStep>(to + r * width + j, Some<Real, kStep>{} + otherwise);
            });
        }
        if (total == nullptr) return;
        Real* const to = total + start;
        each_pixel<Real>(area, [&](int64_t r, int64_t j, auto step) {
            constexpr int64_t kStep = decltype(step)::count;
            put<kStep>(to + r * width + j, Some<Real, kStep>{});
        });
    }
};

// Weights of a step of pixels, and the pixels times their weights. Without weight also a NaN is nothing.
template <bool weighted, typename Real, typename Step>
inline auto counted_weight(const Real* at, Step) {
    constexpr int64_t kStep = Step::count;
    constexpr Some<Real, kStep> zero = {};
    if constexpr (!weighted) {
        return zero + 1;
    } else {
        const auto w = get<kStep>(at);
        return w > 0 ? w : zero;
    }
}

template <bool weighted, typename Stored, typename Step>
inline auto weighted_pixel(const Stored* from, const Sum<Stored>* at, Step) {
    constexpr int64_t kStep = Step::count;
    using Reals = Some<Sum<Stored>, kStep>;
    const Reals value = get<kStep>(from);
    if constexpr (!weighted) {
        return value;
    } else {
        const auto w = get<kStep>(at);
        return w > 0 ? value * w : Reals{};
    }
}

// kPatch: the patch size, of contiguous rows; 0: any.
template <typename Stored, int64_t kPatch, bool weighted>
void write_tile(const Image<Stored>& image, const Candidates& candidates, const Area& tile) {
    using Real = Sum<Stored>;
    Hits hits;
    const int64_t tested = hits.find(candidates, 0, tile);
    const bool all_listed = tested == candidates.count;
    const auto each_hit = [&](const auto& body) {
        int64_t next = all_listed ? tested : hits.find(candidates, 0, tile);
        for (;;) {
            for (int64_t n = 0; n < hits.count; ++n) body(hits.listed[n]);
            if (next == candidates.count) return;
            next = hits.find(candidates, next, tile);
        }
    };

    alignas(64) Real totals[kRows * kPitch<Real>], sums[kRows * kPitch<Real>];
    const ScatterSizes& s = image.s;
    const int64_t size = kPatch ? kPatch : s.patch;
    const int64_t stride_y = image.stride.y, stride_x = kPatch ? 1 : image.stride.x;
    const auto weights = [&](int64_t i, int64_t j) { return weighted ? image.weight + i * size + j : nullptr; };
    clear(tile, totals);
    each_hit([&](const Hit& hit) {
        add_patch<Real, kPatch>(hit, tile, size, true, totals, [&](int64_t i, int64_t j, auto step) {
            return counted_weight<weighted>(weights(i, j), step);
        });
    });
    image.write_totals(tile, totals);
    for (int64_t c = 0; c < s.channels; ++c) {
        clear(tile, sums);
        each_hit([&](const Hit& hit) {
            const Stored* const from = image.patches + hit.index * image.stride.count + c * image.stride.channel;
            add_patch<Real, kPatch>(hit, tile, size, stride_x == 1, sums, [&](int64_t i, int64_t j, auto step) {
                return weighted_pixel<weighted>(from + i * stride_y + j * stride_x, weights(i, j), step);
            });
        });
        image.write_means(tile, totals, sums, image.mean + c * s.height * s.width);
    }
}

template <typename Stored>
using WriteTile = void (*)(const Image<Stored>&, const Candidates&, const Area&);

template <typename Stored>
inline void write_band(const Image<Stored>& image, WriteTile<Stored> write_tile, int64_t top) {
    const ScatterSizes& s = image.s;
    const int64_t pixel_bytes = s.channels * kRows * static_cast<int64_t>(sizeof(Stored)) + 1;
    const int64_t most_columns = clamped(kBandBytes / pixel_bytes / kBlock * kBlock, kBlock, kBandColumns);
    Area band{top, 0, smaller(kRows, s.height - top), 0};
    for (; band.left < s.width; band.left += most_columns) {
        band.columns = smaller(most_columns, s.width - band.left);
        const Candidates candidates(image.corners, s.count, s.patch, band);
        // Long rows are written faster than short ones, even if a few pixels are then written again.
        const bool is_sparse = candidates.blocks * kBlock * 4 < band.columns;
        if (is_sparse) image.write_empty(band);
        const bool* touched = candidates.touched;
        for (int64_t first = 0, last; first * kBlock < band.columns; first = last) {
            const int64_t most = touched[first] ? kColumns<Sum<Stored>> / kBlock : kBandBlocks;
            for (last = first + 1; last < kBandBlocks && last - first < most && touched[last] == touched[first];) {
                ++last;
            }
            const int64_t end = smaller(last * kBlock, band.columns);
            const Area area{band.top, band.left + first * kBlock, band.rows, end - first * kBlock};
            if (touched[first]) {
                write_tile(image, candidates, area);
            } else if (!is_sparse) {
                image.write_empty(area);
            }
        }
    }
}

// to = grad / total * weight, where both are positive, else 0.
template <bool weighted, typename Stored, typename Step>
inline void share(const Stored* grad, const Sum<Stored>* total, const Sum<Stored>* weight, Stored* to, Step) {
    using Real = Sum<Stored>;
    constexpr int64_t kStep = Step::count;
    const auto divisor = get<kStep>(total);
    Some<Real, kStep> value = get<kStep>(grad) / divisor;
    auto counted = divisor > 0;
    if constexpr (weighted) {
        const auto w = get<kStep>(weight);
        value = value * w;
        counted = counted & (w > 0);
    }
    put<kStep>(to, counted ? value : Some<Real, kStep>{});
}

// What each pixel of a patch got of the gradient of its image. kPatch: the patch size, 0: any.
template <typename Stored, int64_t kPatch, bool weighted>
void write_shares(const Stored* grad, const Sum<Stored>* total, const Span& y, const Span& x,
                  const Sum<Stored>* weight, Stored* to, const ScatterSizes& s, const ScatterStrides& stride) {
    using Real = Sum<Stored>;
    const int64_t patch = kPatch ? kPatch : s.patch, stride_x = stride.x;
    const bool whole_rows = kPatch > 0 && x.last - x.first == kPatch && stride_x == 1;
    for (int64_t c = 0; c < s.channels; ++c) {
        for (int64_t i = 0; i < patch; ++i, to += patch) {
            if (!y.contains(i)) {
                std::memset(to, 0, patch * sizeof(Stored));
                continue;
            }
            const int64_t row = y.corner + i, left = x.corner;
            const Stored* const from = grad + c * stride.channel + row * stride.y;
            const Real* const divisors = total + row * s.width;
            const Real* const weights = weighted ? weight + i * patch : nullptr;
            const auto write = [&](int64_t j, auto step) {
                share<weighted>(from + (left + j) * stride_x, divisors + left + j, weighted ? weights + j : nullptr,
                                to + j, step);
            };
            if (whole_rows) {
                in_fixed_steps<Real, kPatch ? kPatch : 1>(write);
                continue;
            }
            std::memset(to, 0, x.first * sizeof(Stored));
            in_steps<Real>(x.first, x.last, stride_x == 1, write);
            std::memset(to + x.last, 0, (patch - x.last) * sizeof(Stored));
        }
    }
}

}  // namespace

template <typename Stored>
void scatter(const Stored* patches, Corners corners, const Sum<Stored>* weight, Stored* mean, Sum<Stored>* total,
             uint8_t* coverage, double fill, const ScatterSizes& s, const ScatterStrides& stride) {
    const int64_t fixed = stride.x == 1 ? s.patch : 0;
    const auto write = fixed == 8    ? weight ? write_tile<Stored, 8, true> : write_tile<Stored, 8, false>
                       : fixed == 16 ? weight ? write_tile<Stored, 16, true> : write_tile<Stored, 16, false>
                       : weight      ? write_tile<Stored, 0, true>
                                     : write_tile<Stored, 0, false>;
    const int64_t bands = s.height / kRows + (s.height % kRows != 0);
    parallel_for(s.width ? s.batch * bands : 0, s.images_bytes + s.patches_bytes, [&](int64_t n) {
        const int64_t b = n / bands, plane = b * s.height * s.width;
        const Image<Stored> image{patches + b * stride.batch,
                                  rest(corners, 2 * b * s.count),
                                  weight,
                                  mean + s.channels * plane,
                                  total ? total + plane : nullptr,
                                  coverage + plane,
                                  static_cast<Sum<Stored>>(fill),
                                  s,
                                  stride};
        write_band(image, write, n % bands * kRows);
    });
}

template <typename Stored>
void scatter_backward(const Stored* grad, const Sum<Stored>* total, Corners corners, const Sum<Stored>* weight,
                      Stored* patches, const ScatterSizes& s, const ScatterStrides& stride) {
    const auto write = s.patch == 8    ? weight ? write_shares<Stored, 8, true> : write_shares<Stored, 8, false>
                       : s.patch == 16 ? weight ? write_shares<Stored, 16, true> : write_shares<Stored, 16, false>
                       : weight        ? write_shares<Stored, 0, true>
                                       : write_shares<Stored, 0, false>;
    const int64_t elements = s.channels * s.patch * s.patch;
    parallel_for(elements ? s.batch * s.count : 0, 2 * s.patches_bytes, [&](int64_t n) {
        const int64_t b = n / s.count;
        const Span y(coordinate(corners, 2 * n), s.patch, s.height);
        const Span x(coordinate(corners, 2 * n + 1), s.patch, s.width);
        Stored* to = patches + n * elements;
        if (y.empty() || x.empty()) {
            std::memset(to, 0, elements * sizeof(Stored));
        } else {
            write(grad + b * stride.batch, total + b * s.height * s.width, y, x, weight, to, s, stride);
        }
    });
}

#define ICSEG_SCATTER(Stored)                                                                                       \
    template void scatter<Stored>(const Stored*, Corners, const Sum<Stored>*, Stored*, Sum<Stored>*, uint8_t*, double, \
                                  const ScatterSizes&, const ScatterStrides&);                                      \
    template void scatter_backward<Stored>(const Stored*, const Sum<Stored>*, Corners, const Sum<Stored>*, Stored*, \
                                           const ScatterSizes&, const ScatterStrides&);
ICSEG_SCATTER(float)
ICSEG_SCATTER(double)
ICSEG_SCATTER(Bfloat16)

}  // namespace ICSEG_ISA
}  // namespace icseg
