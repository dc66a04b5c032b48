#include "scatter_patches.h"

#include "../parallel.h"
#include "simd.h"
#include "span.h"

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

// A vector of so many elements, and its loads and stores.
template <typename Element, int64_t kCount>
struct SomeOf {
    typedef Element type __attribute__((vector_size(kCount * sizeof(Element))));
    typedef Element unaligned
        __attribute__((vector_size(kCount * sizeof(Element)), aligned(alignof(Element)), may_alias));
};
template <int64_t kCount>
struct SomeOf<Bfloat16, kCount> {};  // there are none: loaded and stored as float
template <typename Element, int64_t kCount>
using Some = typename SomeOf<Element, kCount>::type;

template <int64_t kCount, typename Element>
inline Some<Element, kCount> get(const Element* from) {
    return *reinterpret_cast<const typename SomeOf<Element, kCount>::unaligned*>(from);
}
template <int64_t kCount, typename Element>
inline void put(Element* to, Some<Element, kCount> value) {
    *reinterpret_cast<typename SomeOf<Element, kCount>::unaligned*>(to) = value;
}

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

// Which patches touch a band, in their order, and which of its blocks they touch.
struct Candidates {
    int64_t listed[kCandidates];
    bool touched[kBandBlocks];
    int64_t count, blocks;  // of candidates, and of blocks touched
    bool all;  // too many to list: every patch is a candidate, and every block counts as touched

    template <typename Index>
    Candidates(const Index* corners, int64_t patches, int64_t patch, const Area& band)
        : count(0), blocks(0), all(false) {
        std::memset(touched, 0, sizeof touched);
        for (int64_t k = 0; k < patches; ++k) {
            if (!band.is_touched(corners[2 * k], corners[2 * k + 1], patch)) continue;
            if (count == kCandidates) {
                all = true;
                count = patches;
                blocks = kBandBlocks;
                std::memset(touched, 1, sizeof touched);
                return;
            }
            listed[count++] = k;
            const int64_t x = corners[2 * k + 1] - band.left;
            const int64_t last = (smaller(x + patch, band.columns) - 1) / kBlock;
            for (int64_t block = larger<int64_t>(x, 0) / kBlock; block <= last; ++block) {
                blocks += !touched[block];
                touched[block] = true;
            }
        }
    }
};

// A patch that touches a tile: its number, and its corner as seen from the tile's.
struct Hit {
    int64_t index, y, x;
};

struct Hits {
    Hit listed[kHits];
    int64_t count;

    // Lists those of the candidates from `next` on, as many as fit. Returns the first that was not tested.
    template <typename Index>
    int64_t find(const Index* corners, const Candidates& candidates, int64_t next, const Area& tile, int64_t patch) {
        for (count = 0; next < candidates.count && count < kHits; ++next) {
            const int64_t k = candidates.all ? next : candidates.listed[next];
            const int64_t y = corners[2 * k], x = corners[2 * k + 1];
            if (tile.is_touched(y, x, patch)) listed[count++] = {k, y - tile.top, x - tile.left};
        }
        return next;
    }
};

// body(row, column, Step) over a tile, row by row.
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
template <typename Stored, int64_t kPatch, bool weighted>
struct Image {
    using Real = Sum<Stored>;

    const Stored* patches;
    const Real* weight;
    Stored* mean;
    Real* total;
    uint8_t* coverage;
    Real fill;
    const ScatterSizes& s;
    const ScatterStrides& stride;

    template <typename Index>
    void write_band(const Index* corners, int64_t top) const {
        const int64_t pixel_bytes = s.channels * kRows * static_cast<int64_t>(sizeof(Stored)) + 1;
        const int64_t most_columns = clamped(kBandBytes / pixel_bytes / kBlock * kBlock, kBlock, kBandColumns);
        Area band{top, 0, smaller(kRows, s.height - top), 0};
        for (; band.left < s.width; band.left += most_columns) {
            band.columns = smaller(most_columns, s.width - band.left);
            const Candidates candidates(corners, s.count, patch(), band);
            // Long rows are written faster than short ones, even if a few pixels are then written again.
            const bool is_sparse = candidates.blocks * kBlock * 4 < band.columns;
            if (is_sparse) write_empty(band);
            const bool* touched = candidates.touched;
            for (int64_t first = 0, last; first * kBlock < band.columns; first = last) {
                const int64_t most = touched[first] ? kColumns<Real> / kBlock : kBandBlocks;
                for (last = first + 1; last < kBandBlocks && last - first < most && touched[last] == touched[first];) {
                    ++last;
                }
                const int64_t end = smaller(last * kBlock, band.columns);
                const Area area{band.top, band.left + first * kBlock, band.rows, end - first * kBlock};
                if (touched[first]) {
                    write_tile(corners, candidates, area);
                } else if (!is_sparse) {
                    write_empty(area);
                }
            }
        }
    }

    template <typename Index>
    void write_tile(const Index* corners, const Candidates& candidates, const Area& tile) const {
        Hits hits;
        const int64_t tested = hits.find(corners, candidates, 0, tile, patch());
        const bool all_listed = tested == candidates.count;
        const auto each_hit = [&](const auto& body) {
            int64_t next = all_listed ? tested : hits.find(corners, candidates, 0, tile, patch());
            for (;;) {
                for (int64_t n = 0; n < hits.count; ++n) body(hits.listed[n]);
                if (next == candidates.count) return;
                next = hits.find(corners, candidates, next, tile, patch());
            }
        };

        alignas(64) Real totals[kRows * kPitch<Real>], sums[kRows * kPitch<Real>];
        const int64_t size = patch(), stride_y = stride.y, stride_x = kPatch ? 1 : stride.x;
        const Real* const table = weight;
        clear(tile, totals);
        each_hit([&](const Hit& hit) {
            add_patch<Real, kPatch>(hit, tile, size, true, totals, [&](int64_t i, int64_t j, auto step) {
                return counted_weight(table + i * size + j, step);
            });
        });
        write_totals(tile, totals);
        for (int64_t c = 0; c < s.channels; ++c) {
            clear(tile, sums);
            each_hit([&](const Hit& hit) {
                const Stored* const from = patches + hit.index * stride.count + c * stride.channel;
                add_patch<Real, kPatch>(hit, tile, size, stride_x == 1, sums, [&](int64_t i, int64_t j, auto step) {
                    return weighted_pixel(from + i * stride_y + j * stride_x, table + i * size + j, step);
                });
            });
            write_means(tile, totals, sums, mean + c * s.height * s.width);
        }
    }

    int64_t patch() const { return kPatch ? kPatch : s.patch; }

    template <typename Step>
    static auto counted_weight(const Real* at, Step) {
        constexpr int64_t kStep = Step::count;
        constexpr Some<Real, kStep> zero = {};
        if constexpr (!weighted) {
            return zero + 1;
        } else {
            const auto w = get<kStep>(at);
            return w > 0 ? w : zero;
        }
    }

    template <typename Step>
    static auto weighted_pixel(const Stored* from, const Real* at, Step) {
        constexpr int64_t kStep = Step::count;
        const Some<Real, kStep> value = get<kStep>(from);
        if constexpr (!weighted) {
            return value;
        } else {
            const auto w = get<kStep>(at);
            return w > 0 ? value * w : Some<Real, kStep>{};  // without weight also a NaN is nothing
        }
    }

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

template <typename Stored, int64_t kPatch, bool weighted>
void scatter_bands(const Stored* patches, Corners corners, const Sum<Stored>* weight, Stored* mean,
                   Sum<Stored>* total, uint8_t* coverage, double fill, const ScatterSizes& s,
                   const ScatterStrides& stride) {
    const int64_t bands = s.height / kRows + (s.height % kRows != 0);
    parallel_for(s.width ? s.batch * bands : 0, s.images_bytes + s.patches_bytes, [&](int64_t n) {
        const int64_t b = n / bands, plane = b * s.height * s.width, first = 2 * b * s.count;
        const Image<Stored, kPatch, weighted> image{patches + b * stride.batch,
                                                    weight,
                                                    mean + s.channels * plane,
                                                    total ? total + plane : nullptr,
                                                    coverage + plane,
                                                    static_cast<Sum<Stored>>(fill),
                                                    s,
                                                    stride};
        if (corners.narrow) {
            image.write_band(static_cast<const int32_t*>(corners.values) + first, n % bands * kRows);
        } else {
            image.write_band(static_cast<const int64_t*>(corners.values) + first, n % bands * kRows);
        }
    });
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

// One patch after the other: what each pixel of it got of the gradient.
template <typename Stored, int64_t kPatch, bool weighted>
void gather_shares(const Stored* grad, const Sum<Stored>* total, Corners corners, const Sum<Stored>* weight,
                   Stored* patches, const ScatterSizes& s, const ScatterStrides& stride) {
    using Real = Sum<Stored>;
    const int64_t patch = kPatch ? kPatch : s.patch, elements = s.channels * patch * patch;
    parallel_for(elements ? s.batch * s.count : 0, 2 * s.patches_bytes, [&](int64_t n) {
        const int64_t b = n / s.count;
        const auto corner = [&](int64_t i) {
            return corners.narrow ? static_cast<const int32_t*>(corners.values)[i]
                                  : static_cast<const int64_t*>(corners.values)[i];
        };
        const Span y(corner(2 * n), patch, s.height), x(corner(2 * n + 1), patch, s.width);
        Stored* to = patches + n * elements;
        if (y.empty() || x.empty()) {
            std::memset(to, 0, elements * sizeof(Stored));
            return;
        }
        for (int64_t c = 0; c < s.channels; ++c) {
            for (int64_t i = 0; i < patch; ++i, to += patch) {
                if (!y.contains(i)) {
                    std::memset(to, 0, patch * sizeof(Stored));
                    continue;
                }
                const int64_t row = y.corner + i;
                const Stored* from =
                    grad + b * stride.batch + c * stride.channel + row * stride.y + x.corner * stride.x;
                const Real* divisors = total + (b * s.height + row) * s.width + x.corner;
                const auto write = [&](int64_t j, auto step) {
                    share<weighted>(from + j * stride.x, divisors + j, weight + i * patch + j, to + j, step);
                };
                if (kPatch > 0 && x.last - x.first == kPatch && stride.x == 1) {
                    in_fixed_steps<Real, kPatch ? kPatch : 1>(write);
                    continue;
                }
                std::memset(to, 0, x.first * sizeof(Stored));
                in_steps<Real>(x.first, x.last, stride.x == 1, write);
                std::memset(to + x.last, 0, (patch - x.last) * sizeof(Stored));
            }
        }
    });
}

}  // namespace

template <typename Stored>
void scatter(const Stored* patches, Corners corners, const Sum<Stored>* weight, Stored* mean, Sum<Stored>* total,
             uint8_t* coverage, double fill, const ScatterSizes& s, const ScatterStrides& stride) {
    const int64_t fixed = stride.x == 1 ? s.patch : 0;
    const auto kernel = fixed == 8    ? weight ? scatter_bands<Stored, 8, true> : scatter_bands<Stored, 8, false>
                        : fixed == 16 ? weight ? scatter_bands<Stored, 16, true> : scatter_bands<Stored, 16, false>
                        : weight      ? scatter_bands<Stored, 0, true>
                                      : scatter_bands<Stored, 0, false>;
    kernel(patches, corners, weight, mean, total, coverage, fill, s, stride);
}

template <typename Stored>
void scatter_backward(const Stored* grad, const Sum<Stored>* total, Corners corners, const Sum<Stored>* weight,
                      Stored* patches, const ScatterSizes& s, const ScatterStrides& stride) {
    const auto kernel = s.patch == 8    ? weight ? gather_shares<Stored, 8, true> : gather_shares<Stored, 8, false>
                        : s.patch == 16 ? weight ? gather_shares<Stored, 16, true> : gather_shares<Stored, 16, false>
                        : weight        ? gather_shares<Stored, 0, true>
                                        : gather_shares<Stored, 0, false>;
    kernel(grad, total, corners, weight, patches, s, stride);
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
