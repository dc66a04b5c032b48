// The kernels of group_norm_film; sizes are checked, and no product or sum of them overflows.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace icseg {

struct FilmSizes {
    int64_t samples, channels, length, groups;
    bool gelu;
    int64_t bytes;  // of x
};

// Gain or bias of a channel: at data[sample * stride_sample + channel * stride_channel].
template <typename Real>
struct Film {
    const Real* data;
    int64_t stride_sample, stride_channel;
};

// stats: mean, then reciprocal of the standard deviation, [2, samples, groups].
ICSEG_KERNEL(template <typename Real>
             void group_norm_film(const Real* x, const Film<Real>& gain, const Film<Real>& bias, Real* out, Real* stats,
                                  const FilmSizes& s, double eps))
// sums: gradients of gain and bias, [2, samples, channels].
ICSEG_KERNEL(template <typename Real>
             void group_norm_film_backward(const Real* grad, const Real* x, const Real* stats, const Film<Real>& gain,
                                           const Film<Real>& bias, Real* grad_x, Real* sums, const FilmSizes& s))

}  // namespace icseg
