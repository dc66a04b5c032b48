// The tail of cross_conv2d: sums of pairs, their activation and mean; and the gradients.
#include "kernels/cross_conv.h"

#include "checks.h"
#include "pages.h"

namespace icseg {
namespace {

// Fills in the bytes; an error code if sizes are impossible. Past it, no product or sum of sizes overflows.
int checked(CrossSizes& s, int64_t activation, int64_t element_bytes) {
    if (any_negative({s.batch, s.xs, s.ys, s.length})) return ICSEG_NEGATIVE_SIZE;
    if (activation < 0 || activation > static_cast<int64_t>(Activation::gelu)) return ICSEG_ACTIVATION;
    int64_t twice;
    const bool fits = multiply({s.length, element_bytes, s.batch, s.xs}, &s.x_bytes) &&
                      multiply({s.length, element_bytes, s.batch, s.ys}, &s.y_bytes) &&
                      multiply({s.length, element_bytes, s.batch, s.xs, s.ys}, &s.pairs_bytes) &&
                      multiply({s.pairs_bytes, 2}, &twice);
    return fits ? ICSEG_OK : ICSEG_TOO_LARGE;
}

template <typename Real>
int forward(const Real* zx, const Real* zy, Real* pairs, Real* mean, CrossSizes sizes, int64_t activation,
            double slope) {
    if (const int code = checked(sizes, activation, sizeof(Real))) return code;
    if (pairs != zy) expect_writes(pairs, sizes.pairs_bytes);
    expect_writes(mean, sizes.x_bytes);
    ICSEG_CHOSEN(cross_tail<Real>)(zx, zy, pairs, mean, sizes, static_cast<Activation>(activation), slope);
    return ICSEG_OK;
}

template <typename Real>
int backward(const Real* zx, const Real* zy, const Real* grad_pairs, const Real* grad_mean, Real* grad_zx,
             Real* grad_zy, CrossSizes sizes, int64_t activation, double slope) {
    if (const int code = checked(sizes, activation, sizeof(Real))) return code;
    expect_writes(grad_zx, sizes.x_bytes);
    expect_writes(grad_zy, sizes.y_bytes);
    ICSEG_CHOSEN(cross_tail_backward<Real>)
    (zx, zy, grad_pairs, grad_mean, grad_zx, grad_zy, sizes, static_cast<Activation>(activation), slope);
    return ICSEG_OK;
}

}  // namespace
}  // namespace icseg

#define ICSEG_CROSS(Real, suffix)                                                                                     \
    int icseg_cross_tail_##suffix(const Real* zx, const Real* zy, Real* pairs, Real* mean, int64_t batch, int64_t xs, \
                                  int64_t ys, int64_t length, int64_t activation, double slope) {                     \
        const icseg::CrossSizes sizes{batch, xs, ys, length, 0, 0, 0};                                                \
        return icseg::forward<Real>(zx, zy, pairs, mean, sizes, activation, slope);                                   \
    }                                                                                                                 \
    int icseg_cross_tail_backward_##suffix(const Real* zx, const Real* zy, const Real* grad_pairs,                    \
                                           const Real* grad_mean, Real* grad_zx, Real* grad_zy, int64_t batch,        \
                                           int64_t xs, int64_t ys, int64_t length, int64_t activation,                \
                                           double slope) {                                                            \
        const icseg::CrossSizes sizes{batch, xs, ys, length, 0, 0, 0};                                                \
        return icseg::backward<Real>(zx, zy, grad_pairs, grad_mean, grad_zx, grad_zy, sizes, activation, slope);      \
    }
ICSEG_CROSS(float, f32)
ICSEG_CROSS(double, f64)
