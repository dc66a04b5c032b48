#include "gumbel_topk.h"

#include "../parallel.h"
#include "draw.h"

namespace icseg {
namespace ICSEG_ISA {
namespace {

// Making an element's noise and comparing it is worth as much time as moving these bytes.
constexpr int64_t kSeededBytes = 8;

template <typename Real>
Noise<Real> noise_of(const DrawNoise<Real>& from, int64_t row) {
    if (from.seeded) return Noise<Real>::of_seed({from.seed, static_cast<uint32_t>(row), 0, 0});
    return from.values == nullptr ? Noise<Real>::none() : Noise<Real>::of_values(from.values + row * from.stride);
}

template <typename Real>
Drawn<Real> drawn_of(const DrawOutputs<Real>& out, int64_t k, int64_t row) {
    return {out.indices + row * k, out.scores + row * k, out.kappa + row, out.kappa_index + row};
}

template <typename Real>
void draw_one(const Real* logits, int64_t stride, const DrawNoise<Real>& from, const DrawOutputs<Real>& out,
              const DrawSizes& s, int64_t row, Key<Real>* keys) {
    const Real* l = logits + row * stride;
    const Summary<Real> sum = summarise(l, s.count);
    out.logsumexp[row] = sum.logsumexp;
    const Real floor = from.seeded ? likely_floor(sum, s.k) : -kInfinity;
    draw_row(l, s.count, s.k, noise_of(from, row), floor, keys, drawn_of(out, s.k, row));
}

// Few long rows are drawn from in chunks, the best of which then compete. Which rows are does not depend on the number
// of threads, as the order of the sums does not.
constexpr int64_t kChunks = 4;
constexpr int64_t kLongRow = 1 << 18;

template <typename Real>
void draw_long(const Real* logits, int64_t stride, const DrawNoise<Real>& from, const DrawOutputs<Real>& out,
               const DrawSizes& s, int64_t row) {
    const Real* l = logits + row * stride;
    const Noise<Real> noise = noise_of(from, row);
    const int64_t chunk = (s.count / (kChunks * kSumBlock) + 1) * kSumBlock;
    const auto begin = [&](int64_t i) { return smaller(i * chunk, s.count); };
    Sum<Real> sums[kChunks];
    parallel_for(kChunks, s.count * sizeof(Real), [&](int64_t i) { sums[i] = sum_range(l, begin(i), begin(i + 1)); });
    for (int64_t i = 1; i < kChunks; ++i) sums[0].add(sums[i]);
    const Summary<Real> sum = summary_of(sums[0]);
    out.logsumexp[row] = sum.logsumexp;

    Key<Real> found[kChunks][kStackDraws + 1], keys[kStackKeys];
    int64_t counts[kChunks];
    const auto take_chunks = [&](Real floor) {
        parallel_for(kChunks, s.count * sizeof(Real), [&](int64_t i) {
            Key<Real> own[kStackKeys];
            Best<Real> best(s.count, s.k, floor, own);
            take(l, begin(i), begin(i + 1), noise, best);
            best.cut();
            counts[i] = best.count;
            std::memcpy(found[i], own, best.count * sizeof(Key<Real>));
        });
        int64_t total = 0;
        for (const int64_t count : counts) total += count;
        return total;
    };
    const Real floor = from.seeded ? likely_floor(sum, s.k) : -kInfinity;
    if (take_chunks(floor) <= s.k && floor > -kInfinity) take_chunks(-kInfinity);
    Best<Real> best(s.count, s.k, -kInfinity, keys);
    for (int64_t i = 0; i < kChunks; ++i) {
        for (int64_t j = 0; j < counts[i]; ++j) best.push_key(found[i][j]);
    }
    finish(l, s.k, noise, best, drawn_of(out, s.k, row));
}

}  // namespace

template <typename Real>
void draw(const Real* logits, int64_t stride, const DrawNoise<Real>& noise, const DrawOutputs<Real>& out,
          const DrawSizes& s, void* workspace, int64_t slots) {
    const int64_t bytes = s.batch * s.count * (sizeof(Real) + (noise.seeded ? kSeededBytes : 0));
    if (workspace == nullptr && s.batch < kChunks && s.count >= kLongRow) {
        for (int64_t row = 0; row < s.batch; ++row) draw_long(logits, stride, noise, out, s, row);
        return;
    }
    if (workspace == nullptr) {
        parallel_for(s.batch, bytes, [&](int64_t row) {
            Key<Real> keys[kStackKeys];
            draw_one(logits, stride, noise, out, s, row, keys);
        });
        return;
    }
    slots = smaller(slots, s.batch);
    parallel_for(slots, bytes, [&](int64_t slot) {
        Key<Real>* keys = static_cast<Key<Real>*>(workspace) + slot * draw_workspace(s.count, s.k);
        for (int64_t row = slot; row < s.batch; row += slots) {
            draw_one(logits, stride, noise, out, s, row, keys);
        }
    });
}

template <typename Real>
void draw_backward(const DrawGradients<Real>& in, Real* grad, const DrawSizes& s) {
    parallel_for(s.batch, s.batch * s.count * 2 * sizeof(Real), [&](int64_t row) {
        Real* to = grad + row * s.count;
        if (in.grad_logsumexp == nullptr) {
            std::memset(to, 0, s.count * sizeof(Real));
        } else {
            const Real* l = in.logits + row * in.stride;
            const Real scale = in.grad_logsumexp[row], lse = in.logsumexp[row];
            int64_t i = 0;
            for (; i + kLanes<Real> <= s.count; i += kLanes<Real>) store(to + i, exp_below<Real>(load(l + i) - lse) * scale);
            const int64_t left = s.count - i;
            store_first(to + i, exp_below<Real>(load_first(l + i, left) - lse) * scale, left);
        }
        const auto add = [&](int64_t index, Real value) {
            if (index >= 0 && index < s.count) to[index] += value;
        };
        for (int64_t j = 0; j < s.k; ++j) add(in.indices[row * s.k + j], in.grad_scores[row * s.k + j]);
        add(in.kappa_index[row], in.grad_kappa[row]);
    });
}

void gumbel_noise(uint64_t seed, uint32_t stream, uint32_t offset, float* noise, int64_t rows, int64_t elements) {
    const int64_t blocks = elements / kBlock + (elements % kBlock != 0);
    parallel_for(rows * blocks, rows * elements * kSeededBytes, [&](int64_t n) {
        const int64_t row = n / blocks, first = n % blocks * kBlock, some = smaller(kBlock, elements - first);
        uint32_t words[kBlock];
        philox({seed, static_cast<uint32_t>(row), stream, offset}, first, kBlock, words);
        float* to = noise + row * elements + first;
        int64_t i = 0;
        for (; i + kGumbels <= some; i += kGumbels) gumbel(words + i, to + i);
        if (i == some) return;
        float tail[kGumbels];
        gumbel(words + i, tail);
        std::memcpy(to + i, tail, (some - i) * sizeof(float));
    });
}

#define ICSEG_DRAW(Real)                                                                                             \
    template void draw<Real>(const Real*, int64_t, const DrawNoise<Real>&, const DrawOutputs<Real>&,                 \
                             const DrawSizes&, void*, int64_t);                                                      \
    template void draw_backward<Real>(const DrawGradients<Real>&, Real*, const DrawSizes&);
ICSEG_DRAW(float)
ICSEG_DRAW(double)

}  // namespace ICSEG_ISA
}  // namespace icseg
