#include "scatter_patches.h"

#include "../parallel.h"
#include "simd.h"
#include "span.h"

namespace icseg {
namespace ICSEG_ISA {
namespace {

// An image is written tile by tile, each once: its sums stay in the first-level cache meanwhile.
constexpr int64_t kRows = 16;
template <typename Real>
constexpr int64_t kColumns = 512 / static_cast<int64_t>(sizeof(Real));
// Patches of a fixed size are added with whole rows, also where they hang over the sides of a tile.
constexpr int64_t kMargin = 16;
template <typename Real>
constexpr int64_t kPitch = kColumns<Real> + 2 * kMargin;

// How many patches of a band of tiles, and of a tile, are listed. If there are more, all are tested again and again.
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

struct Tile {
    int64_t top, left, rows, columns;
};

// A patch that touches a tile: its number, and its corner as seen from the tile's.
struct Hit {
    int64_t index, y, x;
};

// Which patches touch the rows [top, bottom) of an image, in their order.
struct Candidates {
    int64_t listed[kCandidates];
    int64_t count;
    bool all;  // too many to list: every patch is a candidate

    template <typename Index>
    void find(const Index* corners, const ScatterSizes& s, int64_t top, int64_t bottom) {
        int64_t n = 0;
        all = false;
        for (int64_t k = 0; k < s.count; ++k) {
            if (n == kCandidates) {
                all = true;
                break;
            }
            listed[n] = k;
            n += lies_in(corners[2 * k], top - s.patch + 1, bottom) &
                 lies_in(corners[2 * k + 1], 1 - s.patch, s.width);
        }
        count = all ? s.count : n;
    }
};

struct Hits {
    Hit listed[kHits];
    int64_t count;

    // Lists those of candidates from `next` on, as many as fit: the first that was not tested.
    template <typename Index>
    int64_t find(const Index* corners, const Candidates& candidates, int64_t next, const Tile& tile, int64_t patch) {
        for (count = 0; next < candidates.count && count < kHits; ++next) {
            const int64_t k = candidates.all ? next : candidates.listed[next];
            const int64_t y = corners[2 * k], x = corners[2 * k + 1];
            // Both differences may wrap around where there is no hit.
            listed[count] = {k, static_cast<int64_t>(static_cast<uint64_t>(y) - static_cast<uint64_t>(tile.top)),
                             static_cast<int64_t>(static_cast<uint64_t>(x) - static_cast<uint64_t>(tile.left))};
            count += lies_in(y, tile.top - patch + 1, tile.top + tile.rows) &
                     lies_in(x, tile.left - patch + 1, tile.left + tile.columns);
        }
        return next;
    }
};

// sums += term(i, j, Step) over the pixels (i, j) of a patch that lie in the tile. kPatch: its size, 0 if any.
template <typename Real, int64_t kPatch, typename Term>
inline void add_patch(const Hit& hit, const Tile& tile, int64_t patch, bool vectors, Real* sums, const Term& term) {
    const int64_t last = smaller(patch, tile.rows - hit.y);
    for (int64_t i = larger<int64_t>(0, -hit.y); i < last; ++i) {
        Real* to = sums + (hit.y + i) * kPitch<Real> + kMargin + hit.x;
        const auto add = [&](int64_t j, auto step) {
            constexpr int64_t kStep = decltype(step)::count;
            put<kStep>(to + j, get<kStep>(to + j) + term(i, j, step));
        };
        if constexpr (kPatch > 0) {
            in_fixed_steps<Real, kPatch>(add);
        } else {
            in_steps<Real>(larger<int64_t>(0, -hit.x), smaller(patch, tile.columns - hit.x), vectors, add);
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
        Tile tile{top, 0, smaller(kRows, s.height - top), s.width};
        Candidates candidates;
        candidates.find(corners, s, top, top + tile.rows);
        if (candidates.count == 0) {
            write_empty(tile);
            return;
        }
        for (; tile.left < s.width; tile.left += kColumns<Real>) {
            tile.columns = smaller(kColumns<Real>, s.width - tile.left);
            write_tile(corners, candidates, tile);
        }
    }

    template <typename Index>
    void write_tile(const Index* corners, const Candidates& candidates, const Tile& tile) const {
        Hits hits;
        const int64_t tested = hits.find(corners, candidates, 0, tile, s.patch);
        const bool all_listed = tested == candidates.count;
        if (all_listed && hits.count == 0) {
            write_empty(tile);
            return;
        }
        const auto each_hit = [&](const auto& body) {
            int64_t next = all_listed ? tested : hits.find(corners, candidates, 0, tile, s.patch);
            for (;;) {
                for (int64_t n = 0; n < hits.count; ++n) body(hits.listed[n]);
                if (next == candidates.count) return;
                next = hits.find(corners, candidates, next, tile, s.patch);
            }
        };

        alignas(64) Real totals[kRows * kPitch<Real>], sums[kRows * kPitch<Real>];
        std::memset(totals, 0, tile.rows * kPitch<Real> * sizeof(Real));
        each_hit([&](const Hit& hit) {
            add_patch<Real, kPatch>(hit, tile, patch(), true, totals, [&](int64_t i, int64_t j, auto step) {
                return counted_weight(i, j, step);
            });
        });
        write_totals(tile, totals);
        for (int64_t c = 0; c < s.channels; ++c) {
            std::memset(sums, 0, tile.rows * kPitch<Real> * sizeof(Real));
            each_hit([&](const Hit& hit) {
                const Stored* from = patches + hit.index * stride.count + c * stride.channel;
                add_patch<Real, kPatch>(hit, tile, patch(), stride.x == 1, sums, [&](int64_t i, int64_t j, auto step) {
                    return weighted_pixel(from + i * stride.y + j * (kPatch ? 1 : stride.x), i, j, step);
                });
            });
            write_means(tile, totals, sums, mean + c * s.height * s.width);
        }
    }

    int64_t patch() const { return kPatch ? kPatch : s.patch; }

    template <typename Step>
    auto counted_weight(int64_t i, int64_t j, Step) const {
        constexpr int64_t kStep = Step::count;
        if constexpr (!weighted) return Some<Real, kStep>{} + 1;
        else {
            const auto w = get<kStep>(weight + i * patch() + j);
            return w > 0 ? w : Some<Real, kStep>{};
        }
    }

    template <typename Step>
    auto weighted_pixel(const Stored* from, int64_t i, int64_t j, Step) const {
        constexpr int64_t kStep = Step::count;
        const Some<Real, kStep> value = get<kStep>(from);
        if constexpr (!weighted) return value;
        else {
            const auto w = get<kStep>(weight + i * patch() + j);
            return w > 0 ? value * w : Some<Real, kStep>{};  // without weight also a NaN is nothing
        }
    }

    void write_totals(const Tile& tile, const Real* totals) const {
        for (int64_t r = 0; r < tile.rows; ++r) {
            const Real* from = totals + r * kPitch<Real> + kMargin;
            const int64_t start = (tile.top + r) * s.width + tile.left;
            if (total) std::memcpy(total + start, from, tile.columns * sizeof(Real));
            uint8_t* covered = coverage + start;
            for (int64_t j = 0; j < tile.columns; ++j) covered[j] = from[j] > 0;
        }
    }

    void write_means(const Tile& tile, const Real* totals, const Real* sums, Stored* plane) const {
        for (int64_t r = 0; r < tile.rows; ++r) {
            Stored* to = plane + (tile.top + r) * s.width + tile.left;
            const int64_t from = r * kPitch<Real> + kMargin;
            in_steps<Real>(0, tile.columns, true, [&](int64_t j, auto step) {
                constexpr int64_t kStep = decltype(step)::count;
                const auto divisor = get<kStep>(totals + from + j);
                const auto quotient = get<kStep>(sums + from + j) / divisor;
                put<kStep>(to + j, divisor > 0 ? quotient : Some<Real, kStep>{} + fill);
            });
        }
    }

    void write_empty(const Tile& tile) const {
        for (int64_t r = 0; r < tile.rows; ++r) {
            const int64_t start = (tile.top + r) * s.width + tile.left;
            std::memset(coverage + start, 0, tile.columns);
            if (total) std::memset(total + start, 0, tile.columns * sizeof(Real));
        }
        for (int64_t c = 0; c < s.channels; ++c) {
            for (int64_t r = 0; r < tile.rows; ++r) {
                Stored* to = mean + (c * s.height + tile.top + r) * s.width + tile.left;
                in_steps<Real>(0, tile.columns, true, [&](int64_t j, auto step) {
                    constexpr int64_t kStep = decltype(step)::count;
                    put<kStep>(to + j, Some<Real, kStep>{} + fill);
                });
            }
        }
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
                const Stored* from = grad + b * stride.batch + c * stride.channel + row * stride.y + x.corner * stride.x;
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
