// The kernels of cross_conv2d's tail; sizes are checked, and no product or sum of them overflows.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace icseg {

enum class Activation { none, relu, leaky_relu, gelu };

struct CrossSizes {
    int64_t batch, xs, ys, length;
    int64_t x_bytes, y_bytes, pairs_bytes;
};

// pairs or mean may be null.
ICSEG_KERNEL(template <typename Real>
             void cross_tail(const Real* zx, const Real* zy, Real* pairs, Real* mean, const CrossSizes& s,
                             Activation activation, double slope))
// grad_pairs or grad_mean may be null.
ICSEG_KERNEL(template <typename Real>
             void cross_tail_backward(const Real* zx, const Real* zy, const Real* grad_pairs, const Real* grad_mean,
                                      Real* grad_zx, Real* grad_zy, const CrossSizes& s, Activation activation,
                                      double slope))

}  // namespace icseg
