// The kernels of gumbel_topk; sizes are checked, and no product or sum of them overflows.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace icseg {

struct DrawSizes {
    int64_t batch, count, k;
};

// One of a seed, values (rows `stride` apart) or neither.
template <typename Real>
struct DrawNoise {
    const Real* values;
    int64_t stride;
    bool seeded;
    uint64_t seed;
};

template <typename Real>
struct DrawOutputs {
    int64_t* indices;
    Real* scores;
    Real* logsumexp;
    Real* kappa;
    int64_t* kappa_index;
};

// What the backward pass takes; logits and the two of logsumexp are null for the gradient of the noise.
template <typename Real>
struct DrawGradients {
    const Real* logits;
    int64_t stride;
    const int64_t* indices;
    const int64_t* kappa_index;
    const Real* logsumexp;
    const Real* grad_scores;
    const Real* grad_logsumexp;
    const Real* grad_kappa;
};

// workspace: of `slots` rows; null where none is needed.
ICSEG_KERNEL(template <typename Real>
             void draw(const Real* logits, int64_t stride, const DrawNoise<Real>& noise, const DrawOutputs<Real>& out,
                       const DrawSizes& s, void* workspace, int64_t slots))
ICSEG_KERNEL(template <typename Real>
             void draw_backward(const DrawGradients<Real>& in, Real* grad, const DrawSizes& s))
ICSEG_KERNEL(void gumbel_noise(uint64_t seed, uint32_t stream, uint32_t offset, float* noise, int64_t rows,
                               int64_t elements))

}  // namespace icseg
