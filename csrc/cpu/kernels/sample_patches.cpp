#include "sample_patches.h"

#include "blur.h"
#include "draw.h"
#include "windows.h"

namespace icseg {
namespace ICSEG_ISA {
namespace {

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
    const int64_t phases = smaller(taps, g.stride);
    const int64_t phase_pitch = whole_vectors(g.columns + taps / g.stride + kAlignment);
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

// Logits of `count` samples that were pooled.
template <typename Real>
void soften_samples(const Softening<Real>& softening, const WindowGrid& g, int64_t count,
                    const Workspace<Real>& work) {
    const auto soften = g.taps > 1 ? blurred_logits<Real> : sharp_logits<Real>;
    for_bands(g, count, g.rows, [&](int64_t slot, const Share& rows, int64_t t) {
        soften(work.pooled(slot), work.sample(slot).windows, softening, g, rows, work.task(t), work.logits(slot));
    });
}

// Every so many logits, so many are summed for a guess.
constexpr int64_t kGuessStep = 2048, kGuessBlock = 256;

// A floor for a seeded draw, from a part of the logits.
template <typename Real>
Real guessed_floor(const Real* logits, int64_t count, int64_t draws) {
    if (count < 8 * kGuessStep) return likely_floor(summarise(logits, count), draws);
    Sum<Real> sum{-kInfinity, 0};
    for (int64_t i = 0; i + kGuessBlock <= count; i += kGuessStep) sum.add(sum_block(logits + i, kGuessBlock));
    sum.total *= static_cast<double>(kGuessStep) / kGuessBlock;
    return likely_floor(summary_of(sum), draws);
}

// Below this many windows, one thread draws a sample.
constexpr int64_t kDrawTogether = 32768;

// Draws from a sample's logits in parts of whole blocks, all at once; the best of each are joined in their order.
template <typename Real>
void draw_together(const Real* logits, const WindowGrid& g, const Noise<Real>& noise, Real floor,
                   const Workspace<Real>& work, const Drawn<Real>& out) {
    const int64_t count = g.rows * g.columns, blocks = count / kBlock;
    const auto keys = [&](int64_t t) { return reinterpret_cast<Key<Real>*>(work.task(t)); };
    const auto counted = [&](int64_t t) -> int64_t& { return *reinterpret_cast<int64_t*>(work.task(t) - kAlignment); };
    const auto attempt = [&](Real from) {
        parallel_for(g.threads, kWorthwhile, [&](int64_t t) {
            const Share share(blocks, g.threads, t);
            Best<Real> best(count, g.draws, from, keys(t));
            take(logits, share.first * kBlock, t + 1 < g.threads ? share.last * kBlock : count, noise, best);
            best.cut();
            sort_descending(best.keys, best.count, best.keys + best.capacity);
            counted(t) = best.count;
        });
        Best<Real> all(count, g.draws, from, keys(0));
        all.count = counted(0);
        for (int64_t t = 1; t < g.threads; ++t) {
            for (int64_t i = 0; i < counted(t); ++i) all.push(score_of<Real>(keys(t)[i]), index_of(keys(t)[i]));
        }
        return all;
    };
    Best<Real> best = attempt(floor);
    if (best.count <= g.draws && floor > -kInfinity) best = attempt(-kInfinity);
    finish(logits, g.draws, noise, best, out);
}

// A sample's patches: what was drawn from its logits, and where those windows lie.
template <typename Real>
void draw_sample(const Real* logits, const WindowNoise<Real>& from, const WindowGrid& g, int64_t b,
                 const Workspace<Real>& work, int64_t task, bool together, const DrawnPatches<Real>& out) {
    const int64_t count = g.rows * g.columns;
    Noise<Real> noise = Noise<Real>::none();
    if (from.seeded) noise = Noise<Real>::of_seed({from.seed, static_cast<uint32_t>(b), 0, 0});
    if (from.values != nullptr) noise = Noise<Real>::of_values(from.values + b * from.stride_batch);
    const Drawn<Real> drawn{out.indices + b * g.draws, out.scores + b * g.draws, nullptr, nullptr};
    const Real floor = from.seeded ? guessed_floor(logits, count, g.draws) : -kInfinity;
    if (together) {
        draw_together(logits, g, noise, floor, work, drawn);
    } else {
        draw_row(logits, count, g.draws, noise, floor, reinterpret_cast<Key<Real>*>(work.task(task)), drawn);
    }
    constexpr int32_t kNoPatch = -(1 << 30);
    int32_t* coords = out.coords + 2 * b * g.draws;
    for (int64_t j = 0; j < g.draws; ++j, coords += 2) {
        const int64_t index = drawn.indices[j];
        coords[0] = index < 0 ? kNoPatch : static_cast<int32_t>(index / g.columns * g.stride - g.before);
        coords[1] = index < 0 ? kNoPatch : static_cast<int32_t>(index % g.columns * g.stride - g.before);
    }
}

}  // namespace

template <typename Real>
void sample_patches(const MapBatch<Real>& maps, const Softening<Real>& softening, const WindowNoise<Real>& noise,
                    const WindowGrid& g, Real* workspace, const DrawnPatches<Real>& out) {
    const Workspace<Real> work{workspace, g};
    for (int64_t first = 0; first < g.batch; first += g.slots) {
        const int64_t count = smaller(g.slots, g.batch - first);
        pool_samples(maps, g, first, count, work);
        soften_samples(softening, g, count, work);
        const bool together = count == 1 && g.threads > 1 && g.rows * g.columns >= kDrawTogether;
        parallel_for(count, kWorthwhile, [&](int64_t slot) {
            draw_sample(work.logits(slot), noise, g, first + slot, work, slot, together, out);
        });
    }
}

#define ICSEG_SAMPLE_PATCHES(Real)                                                                                 \
    template void sample_patches<Real>(const MapBatch<Real>&, const Softening<Real>&, const WindowNoise<Real>&,   \
                                       const WindowGrid&, Real*, const DrawnPatches<Real>&);
ICSEG_SAMPLE_PATCHES(float)
ICSEG_SAMPLE_PATCHES(double)

}  // namespace ICSEG_ISA
}  // namespace icseg
