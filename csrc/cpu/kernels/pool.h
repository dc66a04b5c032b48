// Maxima over every window of a zero-padded map. Internal linkage, as all that a kernel file includes (see isa.h).
//
// Rows, then columns: of equal maxima the first in row-major order within rows, then within columns, as two poolings
// in torch. Along a row by doubling, m2k[i] = max(mk[i], mk[i + k]); down a column by blocks of `patch` rows, whose
// maxima from each row to the block's end meet those from the next block's beginning (van Herk, Gil and Werman).
#pragma once

#include "sample_patches.h"
#include "simd.h"

namespace {

using icseg::WindowGrid;

template <typename Real>
constexpr Real infinity() { return static_cast<Real>(__builtin_inf()); }

template <typename Real>
inline Real least_lane(Vector<Real> v) {
    Real least = v[0];
    for (int64_t i = 1; i < kLanes<Real>; ++i) least = smaller<Real>(least, v[i]);
    return least;
}

template <typename Real>
inline Real largest_lane(Vector<Real> v) {
    Real largest = v[0];
    for (int64_t i = 1; i < kLanes<Real>; ++i) largest = larger<Real>(largest, v[i]);
    return largest;
}

template <typename Real>
inline Real sum_lanes(Vector<Real> v) {
    Real sum = v[0];
    for (int64_t i = 1; i < kLanes<Real>; ++i) sum += v[i];
    return sum;
}

// One sample's map, and what its pixels that are not finite count as, once that is known.
template <typename Real>
struct Map {
    const Real* pixels;
    int64_t stride_y, stride_x;
    bool repaired;
    Real lowest, highest;  // finite pixels

    Real repair(Real pixel) const {
        return __builtin_isfinite(pixel) ? pixel : pixel == infinity<Real>() ? highest : lowest;
    }
};

template <typename Real>
inline void set(Real* to, Real value, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// What a set of pixels or windows spans; `finite` is NaN if one of its pixels is not finite, else 0.
template <typename Real>
struct Extremes {
    Real lowest = infinity<Real>(), highest = -infinity<Real>(), finite = 0;

    void join(const Extremes& other) {
        lowest = smaller(lowest, other.lowest);
        highest = larger(highest, other.highest);
        finite += other.finite;
    }
};

template <typename Real>
inline void copy_pixels(const Map<Real>& map, int64_t y, int64_t width, Real* to) {
    const Real* from = map.pixels + y * map.stride_y;
    if (map.stride_x == 1) {
        std::memcpy(to, from, width * sizeof(Real));
    } else {
        for (int64_t x = 0; x < width; ++x) to[x] = from[x * map.stride_x];
    }
}

// The highest of `pixels`, and whether they are finite.
template <typename Real>
inline void scan(const Real* pixels, int64_t count, Extremes<Real>* found) {
    constexpr int64_t n = kLanes<Real>;
    Vector<Real> highest[4], difference[4] = {};  // four, as one would wait for itself
    for (Vector<Real>& v : highest) v = broadcast(found->highest);
    int64_t x = 0;
    for (; x + 4 * n <= count; x += 4 * n) {
        for (int i = 0; i < 4; ++i) {
            const Vector<Real> v = load(pixels + x + i * n);
            highest[i] = larger(highest[i], v);
            difference[i] += v - v;
        }
    }
    found->highest = largest_lane<Real>(larger(larger(highest[0], highest[1]), larger(highest[2], highest[3])));
    found->finite += sum_lanes<Real>(difference[0] + difference[1] + difference[2] + difference[3]);
    for (; x < count; ++x) {
        found->highest = larger(found->highest, pixels[x]);
        found->finite += pixels[x] - pixels[x];
    }
}

// A padded row in the making: zeros, pixels, zeros, then infinities, which never are a lowest maximum.
template <typename Real>
inline void prepare_row(const WindowGrid& g, Real* row) {
    set<Real>(row, 0, g.padded_width);
    set(row + g.padded_width, infinity<Real>(), g.row_elements - g.padded_width);
}

// Row y of the padded map; `row` was prepared.
template <typename Real>
inline void load_row(const Map<Real>& map, const WindowGrid& g, int64_t y, Real* row, Extremes<Real>* found) {
    Real* pixels = row + g.before;
    if (y < g.before || y >= g.before + g.height) {
        set<Real>(pixels, 0, g.width);
        return;
    }
    copy_pixels(map, y - g.before, g.width, pixels);
    if (map.repaired) {
        for (int64_t x = 0; x < g.width; ++x) pixels[x] = map.repair(pixels[x]);
    }
    scan(pixels, g.width, found);
}

// work[x] = max of row[x ... x + k) for the largest k <= patch that is a power of two; returns where they are.
template <typename Real>
inline const Real* double_maxima(const Real* row, int64_t pitch, int64_t patch, Real* work, int64_t* span) {
    constexpr int64_t n = kLanes<Real>;
    int64_t k = 1;
    for (; 4 * k <= patch; k *= 4, row = work) {
        for (int64_t x = 0; x < pitch + patch - 4 * k; x += n) {
            store(work + x, larger(larger(load(row + x), load(row + x + k)),
                                   larger(load(row + x + 2 * k), load(row + x + 3 * k))));
        }
    }
    for (; 2 * k <= patch; k *= 2, row = work) {
        for (int64_t x = 0; x < pitch + patch - 2 * k; x += n) {
            store(work + x, larger(load(row + x), load(row + x + k)));
        }
    }
    *span = k;
    return row;
}

// Scratch of one band, each part whole vectors: see pool_elements in sample_patches.cpp.
template <typename Real>
struct PoolScratch {
    Real *row, *work, *upper, *block;

    PoolScratch(Real* memory, const WindowGrid& g)
        : row(memory), work(row + g.row_elements), upper(work + g.row_elements), block(upper + g.pitch) {}
};

// Maxima of rows [first, last) of windows into pooled [every_rows, pitch].
template <typename Real>
Extremes<Real> pool(const Map<Real>& map, const WindowGrid& g, int64_t first, int64_t last, Real* memory,
                    Real* pooled) {
    constexpr int64_t n = kLanes<Real>;
    const PoolScratch<Real> scratch(memory, g);
    Extremes<Real> found;
    if (g.padded_width > g.width || g.padded_height > g.height) found.highest = 0;
    Vector<Real> lowest = broadcast(infinity<Real>()), lowest_of_others = lowest;
    prepare_row(g, scratch.row);
    int64_t span = 1;
    const auto maxima = [&](int64_t y) {
        load_row(map, g, y, scratch.row, &found);
        return double_maxima(scratch.row, g.pitch, g.patch, scratch.work, &span);
    };
    const auto fill = [&](int64_t y, Real* to) {
        const Real* m = maxima(y);
        for (int64_t x = 0; x < g.pitch; x += n) store(to + x, larger(load(m + x), load(m + x + g.patch - span)));
    };
    for (int64_t i = 0; i + 1 < g.patch; ++i) fill(first + i, scratch.block + i * g.pitch);
    for (int64_t top = first; top < last; top += g.patch) {
        Real* end = scratch.block + (g.patch - 1) * g.pitch;
        fill(top + g.patch - 1, end);
        Real* out = pooled + top * g.pitch;
        for (int64_t x = 0; x < g.pitch; x += n) {
            Vector<Real> lower = load(end + x);
            for (Real* row = end - g.pitch + x; row >= scratch.block; row -= g.pitch) {
                lower = larger(load(row), lower);
                store(row, lower);
            }
            store(out + x, lower);
            lowest = smaller(lowest, lower);
            store(scratch.upper + x, broadcast(-infinity<Real>()));
        }
        for (int64_t i = 1; i < g.patch && top + i < last; ++i) {
            const Real* m = maxima(top + g.patch - 1 + i);
            Real *next = scratch.block + (i - 1) * g.pitch, *lower = next + g.pitch;
            out += g.pitch;
            const auto step = [&](int64_t x, Vector<Real>* least) {
                const Vector<Real> row = larger(load(m + x), load(m + x + g.patch - span));
                const Vector<Real> upper = larger(load(scratch.upper + x), row);
                const Vector<Real> value = larger(load(lower + x), upper);
                store(next + x, row);
                store(scratch.upper + x, upper);
                store(out + x, value);
                *least = smaller(*least, value);
            };
            int64_t x = 0;
            for (; x + 2 * n <= g.pitch; x += 2 * n) {
                step(x, &lowest);
                step(x + n, &lowest_of_others);
            }
            if (x < g.pitch) step(x, &lowest);
        }
    }
    found.lowest = least_lane<Real>(smaller(lowest, lowest_of_others));
    return found;
}

// What the pixels that are not finite count as: the lowest and the highest of the others, 0 where there is none.
template <typename Real>
void find_repair(const WindowGrid& g, Map<Real>* map) {
    Real lowest = infinity<Real>(), highest = -infinity<Real>();
    for (int64_t y = 0; y < g.height; ++y) {
        for (int64_t x = 0; x < g.width; ++x) {
            const Real pixel = map->pixels[y * map->stride_y + x * map->stride_x];
            if (!__builtin_isfinite(pixel)) continue;
            lowest = smaller(lowest, pixel);
            highest = larger(highest, pixel);
        }
    }
    map->repaired = true;
    map->lowest = lowest <= highest ? lowest : 0;
    map->highest = lowest <= highest ? highest : 0;
}

}  // namespace
