#include "gumbel_topk.h"

#include "../parallel.h"
#include "draw.h"

namespace icseg {
namespace ICSEG_ISA {
namespace {

// Making an element's noise and comparing it is worth as much time as moving these bytes.
constexpr int64_t kSeededBytes = 16;

template <typename Real>
void draw_one(const Real* logits, int64_t stride, const DrawNoise<Real>& from, const DrawOutputs<Real>& out,
              const DrawSizes& s, int64_t row, Key<Real>* keys) {
    const Real* l = logits + row * stride;
    Noise<Real> noise = Noise<Real>::none();
    if (from.seeded) noise = Noise<Real>::of_seed({from.seed, static_cast<uint32_t>(row), 0, 0});
    if (from.values != nullptr) noise = Noise<Real>::of_values(from.values + row * from.stride);
    const Summary<Real> sum = summarise(l, s.count);
    out.logsumexp[row] = sum.logsumexp;
    const Real floor = from.seeded ? likely_floor(sum, s.k) : -kInfinity;
    draw_row(l, s.count, s.k, noise, floor, keys,
             {out.indices + row * s.k, out.scores + row * s.k, out.kappa + row, out.kappa_index + row});
}

}  // namespace

template <typename Real>
void draw(const Real* logits, int64_t stride, const DrawNoise<Real>& noise, const DrawOutputs<Real>& out,
          const DrawSizes& s, void* workspace, int64_t slots) {
    const int64_t bytes = s.batch * s.count * (sizeof(Real) + (noise.seeded ? kSeededBytes : 0));
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
            for (; i + kLanes<Real> <= s.count; i += kLanes<Real>) store(to + i, exp_below(load(l + i) - lse) * scale);
            const int64_t left = s.count - i;
            store_first(to + i, exp_below(load_first(l + i, left) - lse) * scale, left);
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
