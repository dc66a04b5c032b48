// Samples and bands at work: what the kernels of sample_patches and of its gradient share. Internal linkage, as all
// that a kernel file includes (see isa.h).
#pragma once

#include "../parallel.h"
#include "divide.h"
#include "pool.h"

namespace {

using icseg::kAlignment;
using icseg::MapBatch;
using icseg::Softening;

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
    Real* logits(int64_t slot) const { return pooled(slot) + g.every_rows * g.pitch; }
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

}  // namespace
