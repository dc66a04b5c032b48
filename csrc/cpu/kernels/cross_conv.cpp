#include "cross_conv.h"

#include "../parallel.h"
#include "gelu.h"
#include "partial.h"
#include "simd.h"

namespace icseg {
namespace ICSEG_ISA {
namespace {

constexpr int64_t kTile = 1024;  // elements of an image; the sums over a tile stay in the first cache

// NaN stays NaN, in values and slopes as in torch's.
template <Activation activation, typename Real>
inline Vector<Real> activated(Vector<Real> z, Real slope) {
    if constexpr (activation == Activation::relu) return z < 0 ? Vector<Real>{} : z;
    if constexpr (activation == Activation::leaky_relu) return z > 0 ? z : z * slope;
    if constexpr (activation == Activation::gelu) return gelu<Real>(z);
    return z;
}

// g times the activation's derivative at z.
template <Activation activation, typename Real>
inline Vector<Real> pulled_back(Vector<Real> g, Vector<Real> z, Real slope) {
    if constexpr (activation == Activation::relu) return z <= 0 ? Vector<Real>{} : g;
    if constexpr (activation == Activation::leaky_relu) return z > 0 ? g : g * slope;
    if constexpr (activation == Activation::gelu) return g * gelu_slope<Real>(z);
    return g;
}

// body(i, lanes) for whole vectors of `count` elements, then body(i, rest).
template <typename Real, typename Body>
inline ICSEG_INLINE void for_each_vector(int64_t count, const Body& body) {
    constexpr int64_t lanes = kLanes<Real>;
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) body(i, lanes);
    if (i < count) body(i, count - i);
}

template <Activation activation, typename Real>
void tail(const Real* zx, const Real* zy, Real* pairs, Real* mean, const CrossSizes& s, double slope_) {
    const int64_t tiles = s.length / kTile + (s.length % kTile != 0);
    const Real slope = static_cast<Real>(slope_), share = static_cast<Real>(s.ys);
    parallel_for(s.batch * s.xs * tiles, s.pairs_bytes, [&](int64_t n) {
        const int64_t image = n / tiles, first = n % tiles * kTile, count = smaller(kTile, s.length - first);
        const Real* x = zx + image * s.length + first;
        const Real* y = zy + image / s.xs * s.ys * s.length + first;
        Real* pair = pairs ? pairs + image * s.ys * s.length + first : nullptr;
        Real* total = mean ? mean + image * s.length + first : nullptr;
        for (int64_t j = 0; j < s.ys; ++j, y += s.length) {
            const auto activate = [&](int64_t i, int64_t some) ICSEG_INLINE {
                return activated<activation, Real>(load_up_to(x + i, some) + load_up_to(y + i, some), slope);
            };
            const bool begins = j == 0, ends = j == s.ys - 1;
            const auto add = [&](int64_t i, int64_t some, Vector<Real> z) ICSEG_INLINE {
                if (!begins) z = load_up_to(total + i, some) + z;
                store_up_to(total + i, ends ? z / share : z, some);
            };
            if (!mean) {
                for_each_vector<Real>(count, [&](int64_t i, int64_t some) ICSEG_INLINE {
                    store_up_to(pair + i, activate(i, some), some);
                });
            } else if (!pairs) {
                for_each_vector<Real>(count, [&](int64_t i, int64_t some) ICSEG_INLINE {
                    add(i, some, activate(i, some));
                });
            } else {
                for_each_vector<Real>(count, [&](int64_t i, int64_t some) ICSEG_INLINE {
                    const Vector<Real> z = activate(i, some);
                    store_up_to(pair + i, z, some);
                    add(i, some, z);
                });
            }
            if (pairs) pair += s.length;
        }
    });
}

// A tile of all images of a sample belongs to one thread, which adds in the order of i, then j.
template <Activation activation, typename Real>
void tail_backward(const Real* zx, const Real* zy, const Real* grad_pairs, const Real* grad_mean, Real* grad_zx,
                   Real* grad_zy, const CrossSizes& s, double slope_) {
    const int64_t tiles = s.length / kTile + (s.length % kTile != 0);
    const Real slope = static_cast<Real>(slope_), share = static_cast<Real>(s.ys);
    parallel_for(s.batch * tiles, 2 * s.pairs_bytes, [&](int64_t n) {
        const int64_t sample = n / tiles, first = n % tiles * kTile, count = smaller(kTile, s.length - first);
        for (int64_t j = 0; s.xs == 0 && j < s.ys; ++j) {
            std::memset(grad_zy + (sample * s.ys + j) * s.length + first, 0, count * sizeof(Real));
        }
        for (int64_t i = 0; i < s.xs; ++i) {
            const int64_t at_x = (sample * s.xs + i) * s.length + first;
            if (s.ys == 0) std::memset(grad_zx + at_x, 0, count * sizeof(Real));
            for (int64_t j = 0; j < s.ys; ++j) {
                const int64_t at_y = (sample * s.ys + j) * s.length + first;
                const int64_t at_pair = ((sample * s.xs + i) * s.ys + j) * s.length + first;
                for_each_vector<Real>(count, [&](int64_t k, int64_t some) ICSEG_INLINE {
                    Vector<Real> g = {};
                    if (grad_pairs) g = load_up_to(grad_pairs + at_pair + k, some);
                    if (grad_mean) g += load_up_to(grad_mean + at_x + k, some) / share;
                    if constexpr (activation != Activation::none) {
                        const Vector<Real> z = load_up_to(zx + at_x + k, some) + load_up_to(zy + at_y + k, some);
                        g = pulled_back<activation, Real>(g, z, slope);
                    }
                    const Vector<Real> sum = j ? load_up_to(grad_zx + at_x + k, some) + g : g;
                    store_up_to(grad_zx + at_x + k, sum, some);
                    if (i) g = load_up_to(grad_zy + at_y + k, some) + g;
                    store_up_to(grad_zy + at_y + k, g, some);
                });
            }
        }
    });
}

}  // namespace

template <typename Real>
void cross_tail(const Real* zx, const Real* zy, Real* pairs, Real* mean, const CrossSizes& s, Activation activation,
                double slope) {
    switch (activation) {
        case Activation::none: return tail<Activation::none>(zx, zy, pairs, mean, s, slope);
        case Activation::relu: return tail<Activation::relu>(zx, zy, pairs, mean, s, slope);
        case Activation::leaky_relu: return tail<Activation::leaky_relu>(zx, zy, pairs, mean, s, slope);
        case Activation::gelu: return tail<Activation::gelu>(zx, zy, pairs, mean, s, slope);
    }
}

template <typename Real>
void cross_tail_backward(const Real* zx, const Real* zy, const Real* grad_pairs, const Real* grad_mean, Real* grad_zx,
                         Real* grad_zy, const CrossSizes& s, Activation activation, double slope) {
    const auto run = [&](auto chosen) { chosen(zx, zy, grad_pairs, grad_mean, grad_zx, grad_zy, s, slope); };
    switch (activation) {
        case Activation::none: return run(tail_backward<Activation::none, Real>);
        case Activation::relu: return run(tail_backward<Activation::relu, Real>);
        case Activation::leaky_relu: return run(tail_backward<Activation::leaky_relu, Real>);
        case Activation::gelu: return run(tail_backward<Activation::gelu, Real>);
    }
}

#define ICSEG_CROSS(Real)                                                                                            \
    template void cross_tail<Real>(const Real*, const Real*, Real*, Real*, const CrossSizes&, Activation, double); \
    template void cross_tail_backward<Real>(const Real*, const Real*, const Real*, const Real*, Real*, Real*,      \
                                            const CrossSizes&, Activation, double);
ICSEG_CROSS(float)
ICSEG_CROSS(double)

}  // namespace ICSEG_ISA
}  // namespace icseg
