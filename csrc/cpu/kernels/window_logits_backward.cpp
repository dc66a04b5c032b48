// The gradient of the logits of sample_patches: back through temperature, stride and blur, through the rescaling by
// the extremes, and from each window to its maximum. Every sum is taken by one thread in a fixed order.
#include "blur.h"
#include "sample_patches.h"
#include "windows.h"

namespace icseg {
namespace ICSEG_ISA {
namespace {

template <typename Real>
struct IndexOf;
template <>
struct IndexOf<float> {
    typedef int32_t type;
};
template <>
struct IndexOf<double> {
    typedef int64_t type;
};

// Large enough for a row or column of a padded map, and as wide as Real.
template <typename Real>
using Index = typename IndexOf<Real>::type;

// What a row of rescaled maxima, of gradient g, adds to the gradient of the extremes; how many of g are not zero.
template <typename Real>
struct RowSums {
    Real grad, grad_times_scaled;
    int64_t lowest_count, highest_count, grad_count;

    void add(const RowSums& other) {
        grad += other.grad;
        grad_times_scaled += other.grad_times_scaled;
        lowest_count += other.lowest_count;
        highest_count += other.highest_count;
        grad_count += other.grad_count;
    }
};

// How many of 0 <= x < count equal `value`.
template <typename Real>
inline int64_t count_equal(const Real* from, int64_t count, Real value) {
    constexpr int64_t n = kLanes<Real>;
    Vector<Index<Real>> found = {};
    int64_t x = 0, total = 0;
    for (; x + n <= count; x += n) found -= load(from + x) == value;
    for (int64_t i = 0; i < n; ++i) total += found[i];
    for (; x < count; ++x) total += from[x] == value;
    return total;
}

// To a window's gradient: of its rescaled maximum times `scale`, and shares of what the extremes get.
template <typename Real>
struct Spread {
    Real scale, lowest_share, highest_share;
};

// Gradient that a row's pixels of NaN and -inf, and of inf, pass on to the lowest and the highest of the others.
template <typename Real>
struct PassedOn {
    Real lowest, highest;
};

// A slot's parts behind its head: see backward_slot_elements in sample_patches.cpp.
template <typename Real>
struct Slot {
    Real *pooled, *grad_scaled, *row_maxima, *grad_row_maxima;
    RowSums<Real>* sums;
    PassedOn<Real>* passed_on;

    Slot(const Workspace<Real>& work, int64_t slot)
        : pooled(work.pooled(slot)),
          grad_scaled(pooled + work.g.every_rows * work.g.pitch),
          row_maxima(grad_scaled + work.g.every_rows * work.g.pitch),
          grad_row_maxima(row_maxima + work.g.padded_height * work.g.pitch),
          sums(reinterpret_cast<RowSums<Real>*>(grad_row_maxima + work.g.padded_height * work.g.pitch)),
          passed_on(reinterpret_cast<PassedOn<Real>*>(sums + work.g.every_rows)) {}
};

// Gradients of kept rows with respect to what the second pass of the blur takes; the last few of them are kept.
template <typename Real>
class BlurredRows {
  public:
    BlurredRows(const Real* grad_logits, const Softening<Real>& softening, const WindowGrid& g, Real* memory)
        : grad_logits_(grad_logits), temperature_(softening.temperature), g_(g) {
        const int64_t radius = g.taps / 2, reach = smaller(radius, g.every_columns), margin = whole_vectors(reach);
        count_ = 2 * reach + 1;
        ring_rows_ = smaller(g.rows, g.taps / g.stride + 2);
        spread_ = memory;  // zeros, gradients at the kept columns, zeros
        reversed_ = spread_ + 2 * margin + g.pitch + kAlignment;
        tap_columns_ = reinterpret_cast<const Real**>(reversed_ + whole_vectors(count_));
        ring_ = reinterpret_cast<Real*>(tap_columns_ + whole_vectors(count_));
        set<Real>(memory, 0, reversed_ - memory);
        set<Real>(ring_, 0, ring_rows_ * g.pitch);
        for (int64_t t = 0; t < count_; ++t) {
            reversed_[t] = g.taps > 1 ? softening.taps[radius + reach - t] : Real(1);
            tap_columns_[t] = spread_ + margin - reach + t;
        }
        kept_ = spread_ + margin;
    }

    const Real* row(int64_t r) const { return ring_ + r % ring_rows_ * g_.pitch; }

    // Makes rows [first, last), none of which lies before those of the last call.
    void advance(int64_t first, int64_t last) {
        for (next_ = larger(next_, first); next_ < last; ++next_) {
            const Real* from = grad_logits_ + next_ * g_.columns;
            for (int64_t c = 0; c < g_.columns; ++c) kept_[c * g_.stride] = from[c] / temperature_;
            sum_taps(reversed_, count_, tap_columns_, g_.every_columns, ring_ + next_ % ring_rows_ * g_.pitch);
        }
    }

    Real* end() const { return ring_ + ring_rows_ * g_.pitch; }

  private:
    const Real* grad_logits_;
    const Real temperature_;
    const WindowGrid& g_;
    Real *spread_, *kept_, *reversed_, *ring_;
    const Real** tap_columns_;
    int64_t count_, ring_rows_, next_ = 0;
};

// Rows `rows` of the gradient of the rescaled maxima, and its sums.
template <typename Real>
void back_to_scaled(const Real* grad_logits, const Softening<Real>& softening, const Extremes<Real>& windows,
                    const WindowGrid& g, const Share& rows, Real* memory, const Slot<Real>& slot) {
    const int64_t radius = g.taps / 2;
    const Real range = windows.highest - windows.lowest + static_cast<Real>(1e-6);
    BlurredRows<Real> blurred(grad_logits, softening, g, memory);
    Real* taps = blurred.end();
    const int64_t most = whole_vectors(smaller(g.rows, g.taps / g.stride + 2));
    const Real** tap_rows = reinterpret_cast<const Real**>(taps + most);
    for (int64_t y = rows.first; y < rows.last; ++y) {
        const int64_t first = y > radius ? (y - radius + g.stride - 1) / g.stride : 0;
        const int64_t last = smaller(g.rows, (y + radius) / g.stride + 1);
        Real* grad = slot.grad_scaled + y * g.pitch;
        set<Real>(grad, 0, g.pitch);
        if (first < last) {
            blurred.advance(first, last);
            for (int64_t r = first; r < last; ++r) {
                taps[r - first] = g.taps > 1 ? softening.taps[y - r * g.stride + radius] : Real(1);
                tap_rows[r - first] = blurred.row(r);
            }
            sum_taps(taps, last - first, tap_rows, g.every_columns, grad);
        }
        const Real* pooled = slot.pooled + y * g.pitch;
        RowSums<Real> sums{};
        sums.lowest_count = count_equal(pooled, g.every_columns, windows.lowest);
        sums.highest_count = count_equal(pooled, g.every_columns, windows.highest);
        if (first < last) sums.grad_count = g.every_columns - count_equal(grad, g.every_columns, Real(0));
        if (sums.grad_count > 0) {
            constexpr int64_t n = kLanes<Real>;
            Vector<Real> sum = {}, product = {};
            int64_t x = 0;
            for (; x + n <= g.every_columns; x += n) {
                const Vector<Real> v = load(grad + x);
                sum += v;
                product += v * ((load(pooled + x) - windows.lowest) / range);
            }
            sums.grad = sum_lanes<Real>(sum);
            sums.grad_times_scaled = sum_lanes<Real>(product);
            for (; x < g.every_columns; ++x) {
                sums.grad += grad[x];
                sums.grad_times_scaled += grad[x] * ((pooled[x] - windows.lowest) / range);
            }
        }
        slot.sums[y] = sums;
    }
}

// Maxima along rows `rows` of the padded map, and zeros for their gradient.
template <typename Real>
void row_maxima(const Map<Real>& map, const WindowGrid& g, const Share& rows, Real* memory, const Slot<Real>& slot) {
    const PoolScratch<Real> scratch(memory, g);
    Extremes<Real> unused;
    prepare_row(g, scratch.row);
    for (int64_t y = rows.first; y < rows.last; ++y) {
        load_row(map, g, y, scratch.row, &unused);
        int64_t span;
        const Real* m = double_maxima(scratch.row, g.pitch, g.patch, scratch.work, &span);
        Real* to = slot.row_maxima + y * g.pitch;
        for (int64_t x = 0; x < g.pitch; x += kLanes<Real>) {
            store(to + x, larger(load(m + x), load(m + x + g.patch - span)));
        }
        set<Real>(slot.grad_row_maxima + y * g.pitch, 0, g.pitch);
    }
}

template <typename Real>
RowSums<Real> total(const RowSums<Real>* rows, const WindowGrid& g) {
    RowSums<Real> all{};
    for (int64_t y = 0; y < g.every_rows; ++y) all.add(rows[y]);
    return all;
}

// As torch differentiates amin and amax: equal shares to all that attain them.
template <typename Real>
Spread<Real> spread_of(const RowSums<Real>& all, const Extremes<Real>& windows) {
    const Real range = windows.highest - windows.lowest + static_cast<Real>(1e-6);
    const Real to_range = -all.grad_times_scaled / range;
    return {1 / range, (-all.grad / range - to_range) / static_cast<Real>(all.lowest_count),
            to_range / static_cast<Real>(all.highest_count)};
}

// Gradients of the maxima of windows [left, left + width) of row y, before the rescaling.
template <typename Real>
inline void back_to_maxima(const Extremes<Real>& windows, const Spread<Real>& spread, const WindowGrid& g, int64_t y,
                           int64_t left, int64_t width, const Slot<Real>& slot, Real* grad) {
    const Vector<Real> none = {};
    for (int64_t x = 0; x < width; x += kLanes<Real>) {
        const Vector<Real> pooled = load(slot.pooled + y * g.pitch + left + x);
        store(grad + x, load(slot.grad_scaled + y * g.pitch + left + x) * spread.scale +
                            (pooled == windows.lowest ? broadcast(spread.lowest_share) : none) +
                            (pooled == windows.highest ? broadcast(spread.highest_share) : none));
    }
}

// As back_down_columns, but looks for a window's maximum only where there is a gradient.
template <typename Real>
void back_down_few(const Extremes<Real>& windows, const Spread<Real>& spread, const WindowGrid& g, int64_t left,
                   const Slot<Real>& slot) {
    const int64_t width = smaller(kStrip, g.pitch - left), used = smaller(width, g.every_columns - left);
    for (int64_t y = 0; y < g.every_rows; ++y) {
        const RowSums<Real>& sums = slot.sums[y];
        if (sums.grad_count + sums.lowest_count + sums.highest_count == 0) continue;
        Real grad[kStrip];
        back_to_maxima(windows, spread, g, y, left, width, slot, grad);
        for (int64_t x = 0; x < used; ++x) {
            if (grad[x] == 0) continue;
            const Real* maxima = slot.row_maxima + y * g.pitch + left + x;
            int64_t place = 0;
            for (int64_t i = 1; i < g.patch; ++i) place = maxima[i * g.pitch] > maxima[place * g.pitch] ? i : place;
            slot.grad_row_maxima[(y + place) * g.pitch + left + x] += grad[x];
        }
    }
}

// From windows to the first maximum down each of up to kStrip columns from `left`.
template <typename Real>
void back_down_columns(const Extremes<Real>& windows, const Spread<Real>& spread, const WindowGrid& g, int64_t left,
                       Real* memory, const Slot<Real>& slot) {
    constexpr int64_t n = kLanes<Real>;
    using Places = Vector<Index<Real>>;
    const int64_t width = smaller(kStrip, g.pitch - left), used = smaller(width, g.every_columns - left);
    Real *values = memory, *upper = values + g.patch * kStrip;
    Index<Real>* places = reinterpret_cast<Index<Real>*>(upper + kStrip);
    Index<Real>* upper_place = places + g.patch * kStrip;
    for (int64_t top = 0; top < g.every_rows; top += g.patch) {
        for (int64_t x = 0; x < width; x += n) {
            Vector<Real> lower = broadcast(-infinity<Real>());
            Places place = {};
            for (int64_t i = g.patch - 1; i >= 0; --i) {
                const Vector<Real> value = load(slot.row_maxima + (top + i) * g.pitch + left + x);
                place = value >= lower ? broadcast(static_cast<Index<Real>>(top + i)) : place;
                lower = larger(value, lower);
                store(values + i * kStrip + x, lower);
                store(places + i * kStrip + x, place);
            }
            store(upper + x, broadcast(-infinity<Real>()));
        }
        for (int64_t i = 0; i < g.patch && top + i < g.every_rows; ++i) {
            const int64_t y = top + i, below = y + g.patch - 1;
            Real grad[kStrip];
            Index<Real> chosen[kStrip];
            for (int64_t x = 0; x < width; x += n) {
                Vector<Real> best = load(upper + x);
                Places best_place = load(upper_place + x);
                if (i > 0) {
                    const Vector<Real> value = load(slot.row_maxima + below * g.pitch + left + x);
                    best_place = value > best ? broadcast(static_cast<Index<Real>>(below)) : best_place;
                    best = larger(best, value);
                    store(upper + x, best);
                    store(upper_place + x, best_place);
                }
                store(chosen + x,
                      best > load(values + i * kStrip + x) ? best_place : load(places + i * kStrip + x));
            }
            back_to_maxima(windows, spread, g, y, left, width, slot, grad);
            Real* to = slot.grad_row_maxima + left;
            for (int64_t x = 0; x < used; ++x) to[chosen[x] * g.pitch + x] += grad[x];
        }
    }
}

// places[x] = where row[x ... x + patch) first attains its maximum.
template <typename Real>
void find_places(const WindowGrid& g, const Real* row, Real* work, Index<Real>* places) {
    std::memcpy(work, row, g.row_elements * sizeof(Real));
    for (int64_t x = 0; x < g.row_elements; ++x) places[x] = static_cast<Index<Real>>(x);
    for (int64_t k = 1; k < g.patch;) {
        const int64_t step = smaller(k, g.patch - k);
        for (int64_t x = 0; x < g.pitch + g.patch - k - step; x += kLanes<Real>) {
            const Vector<Real> a = load(work + x), b = load(work + x + step);
            store(places + x, b > a ? load(places + x + step) : load(places + x));
            store(work + x, larger(a, b));
        }
        k += step;
    }
}

// From maxima along a row to the first pixel that attains each; rows `rows` of the map.
template <typename Real>
void back_along_rows(const Map<Real>& map, const WindowGrid& g, const Share& rows, Real* memory,
                     const Slot<Real>& slot, Real* grad_map) {
    Real *row = memory, *work = row + g.row_elements, *grad = work + g.row_elements;
    Index<Real>* places = reinterpret_cast<Index<Real>*>(grad + g.row_elements);
    Extremes<Real> unused;
    prepare_row(g, row);
    for (int64_t y = rows.first; y < rows.last; ++y) {
        const Real* from = slot.grad_row_maxima + (y + g.before) * g.pitch;
        Real* to = grad_map + y * g.width;
        const int64_t some = g.every_columns - count_equal(from, g.every_columns, Real(0));
        if (some == 0) {
            set<Real>(to, 0, g.width);
            slot.passed_on[y] = {};
            continue;
        }
        load_row(map, g, y + g.before, row, &unused);
        set<Real>(grad, 0, g.row_elements);
        if (some < g.every_columns / g.patch) {
            for (int64_t x = 0; x < g.every_columns; ++x) {
                if (from[x] == 0) continue;
                int64_t place = x;
                for (int64_t i = x + 1; i < x + g.patch; ++i) place = row[i] > row[place] ? i : place;
                grad[place] += from[x];
            }
        } else {
            find_places(g, row, work, places);
            for (int64_t x = 0; x < g.every_columns; ++x) grad[places[x]] += from[x];
        }
        std::memcpy(to, grad + g.before, g.width * sizeof(Real));
        if (!map.repaired) continue;
        PassedOn<Real> passed_on{};
        const Real* pixels = map.pixels + y * map.stride_y;
        for (int64_t x = 0; x < g.width; ++x) {
            const Real pixel = pixels[x * map.stride_x];
            if (__builtin_isfinite(pixel)) continue;
            (pixel == infinity<Real>() ? passed_on.highest : passed_on.lowest) += to[x];
            to[x] = 0;
        }
        slot.passed_on[y] = passed_on;
    }
}

// Equal shares of what the pixels that are not finite pass on; nothing if no pixel is finite.
template <typename Real>
void share_passed_on(const Map<Real>& map, const WindowGrid& g, const Slot<Real>& slot, Real* grad_map) {
    PassedOn<Real> all{}, count{};
    const auto pixel = [&](int64_t y, int64_t x) { return map.pixels[y * map.stride_y + x * map.stride_x]; };
    for (int64_t y = 0; y < g.height; ++y) {
        all.lowest += slot.passed_on[y].lowest;
        all.highest += slot.passed_on[y].highest;
        for (int64_t x = 0; x < g.width; ++x) {
            if (!__builtin_isfinite(pixel(y, x))) continue;
            count.lowest += pixel(y, x) == map.lowest;
            count.highest += pixel(y, x) == map.highest;
        }
    }
    for (int64_t y = 0; y < g.height; ++y) {
        for (int64_t x = 0; x < g.width; ++x, ++grad_map) {
            if (!__builtin_isfinite(pixel(y, x))) continue;
            if (pixel(y, x) == map.lowest) *grad_map += all.lowest / count.lowest;
            if (pixel(y, x) == map.highest) *grad_map += all.highest / count.highest;
        }
    }
}

}  // namespace

template <typename Real>
void window_logits_backward(const MapBatch<Real>& maps, const Real* grad_logits, const Softening<Real>& softening,
                            const WindowGrid& g, Real* workspace, Real* grad_maps) {
    const Workspace<Real> work{workspace, g};
    for (int64_t first = 0; first < g.batch; first += g.slots) {
        const int64_t count = smaller(g.slots, g.batch - first);
        const auto grad_map = [&](int64_t slot) { return grad_maps + (first + slot) * g.height * g.width; };
        pool_samples(maps, g, first, count, work);
        for_bands(g, count, g.every_rows, [&](int64_t slot, const Share& rows, int64_t t) {
            back_to_scaled(grad_logits + (first + slot) * g.rows * g.columns, softening, work.sample(slot).windows, g,
                           rows, work.task(t), Slot<Real>(work, slot));
        });
        for_bands(g, count, g.padded_height, [&](int64_t slot, const Share& rows, int64_t t) {
            row_maxima(work.sample(slot).map, g, rows, work.task(t), Slot<Real>(work, slot));
        });
        for_bands(g, count, (g.pitch + kStrip - 1) / kStrip, [&](int64_t slot, const Share& strips, int64_t t) {
            const Slot<Real> parts(work, slot);
            const Extremes<Real> windows = work.sample(slot).windows;
            const RowSums<Real> all = total(parts.sums, g);
            const Spread<Real> spread = spread_of(all, windows);
            const int64_t some = all.grad_count + all.lowest_count + all.highest_count;
            for (int64_t strip = strips.first; strip < strips.last; ++strip) {
                if (some < g.every_rows * g.every_columns / g.patch) {
                    back_down_few(windows, spread, g, strip * kStrip, parts);
                } else {
                    back_down_columns(windows, spread, g, strip * kStrip, work.task(t), parts);
                }
            }
        });
        for_bands(g, count, g.height, [&](int64_t slot, const Share& rows, int64_t t) {
            back_along_rows(work.sample(slot).map, g, rows, work.task(t), Slot<Real>(work, slot), grad_map(slot));
        });
        for (int64_t slot = 0; slot < count; ++slot) {
            const Map<Real>& map = work.sample(slot).map;
            if (map.repaired) share_passed_on(map, g, Slot<Real>(work, slot), grad_map(slot));
        }
    }
}

#define ICSEG_WINDOW_LOGITS_BACKWARD(Real)                                                                         \
    template void window_logits_backward<Real>(const MapBatch<Real>&, const Real*, const Softening<Real>&,        \
                                               const WindowGrid&, Real*, Real*);
ICSEG_WINDOW_LOGITS_BACKWARD(float)
ICSEG_WINDOW_LOGITS_BACKWARD(double)

}  // namespace ICSEG_ISA
}  // namespace icseg
