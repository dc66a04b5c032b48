#include "sample_patches.h"

#include "../parallel.h"
#include "blur.h"
#include "divide.h"
#include "pool.h"

namespace icseg {
namespace ICSEG_ISA {
namespace {

constexpr int64_t kWorthwhile = kParallelBytes + 1;  // the entry has decided how many threads

inline int64_t whole_vectors(int64_t count) { return (count + kAlignment - 1) / kAlignment * kAlignment; }

// Part `i` of `parts` equal ones.
struct Share {
    int64_t first, last;
    Share(int64_t total, int64_t parts, int64_t i) : first(total * i / parts), last(total * (i + 1) / parts) {}
};

// A sample at work: its map and the extremes of its windows' maxima.
template <typename Real>
struct Sample {
    Map<Real> map;
    Extremes<Real> windows;
};
static_assert(sizeof(Sample<float>) <= kAlignment * sizeof(float), "the head of a slot holds it");
static_assert(sizeof(Sample<double>) <= kAlignment * sizeof(double), "the head of a slot holds it");

// The workspace: a head and the maxima of each sample at work, then a head and scratch of each band at work.
template <typename Real>
struct Workspace {
    Real* memory;
    const WindowGrid& g;

    Sample<Real>& sample(int64_t slot) const {
        return *reinterpret_cast<Sample<Real>*>(memory + slot * g.slot_elements);
    }
    Real* pooled(int64_t slot) const { return memory + slot * g.slot_elements + kAlignment; }
    Real* task(int64_t t) const {
        return memory + g.slots * g.slot_elements + t * (kAlignment + g.task_elements) + kAlignment;
    }
    Extremes<Real>& found(int64_t t) const { return *reinterpret_cast<Extremes<Real>*>(task(t) - kAlignment); }
};

// Bands of one of `samples` that are at work at once.
inline int64_t bands(const WindowGrid& g, int64_t samples) {
    const int64_t enough = (g.threads + samples - 1) / samples;
    return larger<int64_t>(1, smaller(enough, g.every_rows / larger<int64_t>(g.patch, 16)));
}

// body(slot, share of `rows`, task) for every band of every one of `samples`.
template <typename Body>
inline void for_bands(const WindowGrid& g, int64_t samples, int64_t rows, const Body& body) {
    const int64_t each = bands(g, samples);
    parallel_for(samples * each, kWorthwhile, [&](int64_t t) { body(t / each, Share(rows, each, t % each), t); });
}

// Samples [first, first + count): maxima of all their windows, and the extremes of those.
template <typename Real>
void pool_samples(const MapBatch<Real>& maps, const WindowGrid& g, int64_t first, int64_t count,
                  const Workspace<Real>& work) {
    for (int64_t slot = 0; slot < count; ++slot) {
        const Real* pixels = maps.pixels + (first + slot) * maps.stride_batch;
        work.sample(slot) = {{pixels, maps.stride_y, maps.stride_x, false, 0, 0}, {}};
    }
    for_bands(g, count, g.every_rows, [&](int64_t slot, const Share& rows, int64_t t) {
        work.found(t) = pool(work.sample(slot).map, g, rows.first, rows.last, work.task(t), work.pooled(slot));
    });
    const int64_t each = bands(g, count);
    bool finite = true;
    for (int64_t t = 0; t < count * each; ++t) work.sample(t / each).windows.join(work.found(t));
    for (int64_t slot = 0; slot < count; ++slot) finite = finite && work.sample(slot).windows.finite == 0;
    if (finite) return;
    parallel_for(count, kWorthwhile, [&](int64_t slot) {
        Sample<Real>& sample = work.sample(slot);
        if (sample.windows.finite == 0) return;
        find_repair(g, &sample.map);
        sample.windows = pool(sample.map, g, 0, g.every_rows, work.task(slot), work.pooled(slot));
    });
}

template <typename Real>
inline Divisor<Real> rescaling(const Extremes<Real>& windows) {
    return Divisor<Real>(windows.highest - windows.lowest + static_cast<Real>(1e-6));
}

// Logits of kept rows `rows`, without blur.
template <typename Real>
void sharp_logits(const Real* pooled, const Extremes<Real>& windows, const Softening<Real>& softening,
                  const WindowGrid& g, const Share& rows, Real* memory, Real* logits) {
    const Divisor<Real> scale = rescaling(windows), temperature(softening.temperature);
    const int64_t length = whole_vectors(g.columns);
    Real *scaled = memory, *picked = memory + length;
    set<Real>(picked, 0, length);
    for (int64_t r = rows.first; r < rows.last; ++r) {
        const Real* from = pooled + r * g.stride * g.pitch;
        if (g.stride > 1) {
            for (int64_t c = 0; c < g.columns; ++c) picked[c] = from[c * g.stride];
            from = picked;
        }
        divide_row(from, windows.lowest, scale, length, scaled);
        divide_row(scaled, Real(0), temperature, g.columns, logits + r * g.columns);
    }
}

// Rescaled rows of windows, of which the last few are kept.
template <typename Real>
struct ScaledRows {
    const Real* pooled;
    const WindowGrid& g;
    Real lowest;
    Divisor<Real> scale;
    Real* memory;
    int64_t count, next;

    ScaledRows(const Real* pooled, const Extremes<Real>& windows, const WindowGrid& g, Real* memory)
        : pooled(pooled),
          g(g),
          lowest(windows.lowest),
          scale(rescaling(windows)),
          memory(memory),
          count(smaller(g.taps, g.every_rows)),
          next(0) {}

    Real* row(int64_t y) const { return memory + y % count * g.pitch; }

    // Makes rows [first, last), none of which lies before those of the last call.
    void advance(int64_t first, int64_t last) {
        for (next = larger(next, first); next < last; ++next) {
            divide_row(pooled + next * g.pitch, lowest, scale, g.pitch, row(next));
        }
    }
};

// Logits of kept rows `rows`, blurred: down the columns at the kept rows, then along those at the kept columns.
template <typename Real>
void blurred_logits(const Real* pooled, const Extremes<Real>& windows, const Softening<Real>& softening,
                    const WindowGrid& g, const Share& rows, Real* memory, Real* logits) {
    const Divisor<Real> temperature(softening.temperature);
    const int64_t radius = g.taps / 2, reach = smaller(radius, g.every_columns);  // beyond it, a tap meets zeros only
    const int64_t taps = 2 * reach + 1, margin = whole_vectors(reach);
    const int64_t phases = smaller(taps, g.stride), phase_pitch = whole_vectors(g.columns + taps / g.stride + kAlignment);
    const int64_t filled = 2 * margin + g.pitch + kAlignment + phases * phase_pitch + whole_vectors(g.columns);
    Real* column_sums = memory;  // zeros, every_columns sums, zeros
    Real* deinterleaved = column_sums + 2 * margin + g.pitch + kAlignment;
    Real* row_sums = deinterleaved + phases * phase_pitch;
    const Real** tap_rows = reinterpret_cast<const Real**>(memory + filled);
    const Real** tap_columns = tap_rows + whole_vectors(smaller(g.taps, g.every_rows));
    ScaledRows<Real> scaled(pooled, windows, g, reinterpret_cast<Real*>(tap_columns + whole_vectors(taps)));
    set<Real>(memory, 0, filled);
    const Real* from = column_sums + margin - reach;
    for (int64_t t = 0; t < taps; ++t) {
        tap_columns[t] = g.stride > 1 ? deinterleaved + t % g.stride * phase_pitch + t / g.stride : from + t;
    }
    for (int64_t r = rows.first; r < rows.last; ++r) {
        const int64_t y = r * g.stride, first = larger<int64_t>(0, y - radius);
        const int64_t last = smaller(g.every_rows, y + radius + 1);
        scaled.advance(first, last);
        for (int64_t i = first; i < last; ++i) tap_rows[i - first] = scaled.row(i);
        sum_taps(softening.taps + (first - y + radius), last - first, tap_rows, g.every_columns, column_sums + margin);
        for (int64_t q = 0; g.stride > 1 && q < phases; ++q) {
            const int64_t length = g.columns + (taps - 1 - q) / g.stride;
            for (int64_t c = 0; c < length; ++c) deinterleaved[q * phase_pitch + c] = from[c * g.stride + q];
        }
        sum_taps(softening.taps + (radius - reach), taps, tap_columns, g.columns, row_sums);
        divide_row(row_sums, Real(0), temperature, g.columns, logits + r * g.columns);
    }
}

// Logits of `count` samples that were pooled, each at logits_of(slot).
template <typename Real, typename LogitsOf>
void soften_samples(const Softening<Real>& softening, const WindowGrid& g, int64_t count,
                    const Workspace<Real>& work, const LogitsOf& logits_of) {
    const auto soften = g.taps > 1 ? blurred_logits<Real> : sharp_logits<Real>;
    for_bands(g, count, g.rows, [&](int64_t slot, const Share& rows, int64_t t) {
        soften(work.pooled(slot), work.sample(slot).windows, softening, g, rows, work.task(t), logits_of(slot));
    });
}

}  // namespace

template <typename Real>
void window_logits(const MapBatch<Real>& maps, const Softening<Real>& softening, const WindowGrid& g, Real* workspace,
                   Real* logits) {
    const Workspace<Real> work{workspace, g};
    for (int64_t first = 0; first < g.batch; first += g.slots) {
        const int64_t count = smaller(g.slots, g.batch - first);
        pool_samples(maps, g, first, count, work);
        soften_samples(softening, g, count, work,
                       [&](int64_t slot) { return logits + (first + slot) * g.rows * g.columns; });
    }
}

#define ICSEG_WINDOW_LOGITS(Real)                                                                               \
    template void window_logits<Real>(const MapBatch<Real>&, const Softening<Real>&, const WindowGrid&, Real*, \
                                      Real*);
ICSEG_WINDOW_LOGITS(float)
ICSEG_WINDOW_LOGITS(double)

}  // namespace ICSEG_ISA
}  // namespace icseg
