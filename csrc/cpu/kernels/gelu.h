// GELU by the exact normal distribution function, and its derivative. Internal linkage, as all that a kernel file
// includes (see isa.h).
#pragma once

#include "exponential.h"
#include "simd.h"

namespace {

// With u = |v|, Phi(-u) = exp(-u^2 / 2) * t * R(s), where t = 1 / (1 + step * u) and s = factor * t + offset runs over
// [-1, 1] until the exponential underflows. R is a polynomial fitted to that (2e-8 and 3e-16 relative), lowest power
// first.
template <typename Real>
struct Normal;

template <>
struct Normal<float> {
    static constexpr float step = 0.26f, factor = 2.5698005698f, offset = -1.5698005698f;
    static constexpr float ratio[] = {0.235145942f,     0.158837929f,     0.0771491846f,
                                      0.0252224758f,    0.00425650019f,   -0.000333696075f,
                                      -0.000289461835f, -5.07011135e-06f, 1.61854013e-05f};
    static constexpr int32_t sign = INT32_MIN;
};

template <>
struct Normal<double> {
    static constexpr double step = 0.2, factor = 2.2564102564102564, offset = -1.2564102564102564;
    static constexpr double ratio[] = {
        0.17033792891176728,    0.14024520173287393,    0.096797979149959304,   0.055443694420699785,
        0.025734013027084815,   0.0091945865962121788,  0.002213075598114093,   0.000172549713099234,
        -0.00010487029489849165, -3.8645453953097607e-5, 8.9422639651413981e-7,  3.5617770526436171e-6,
        3.712836391231887e-7,   -3.164568942356128e-7,  -5.8999485921050779e-8, 3.1551457029999714e-8,
        6.9314590572936671e-9,  -3.3415386059153622e-9, -6.7261204646770459e-10, 2.574234919491805e-10,
        4.2143944657503306e-11};
    static constexpr int64_t sign = INT64_MIN;
};

template <typename Real, int first = 0, int count>
inline Vector<Real> polynomial(const Real (&coefficients)[count], Vector<Real> x) {
    const Vector<Real> lowest = broadcast(coefficients[first]);
    if constexpr (first + 1 == count) {
        return lowest;
    } else {
        return fma(polynomial<Real, first + 1>(coefficients, x), x, lowest);
    }
}

// The normal distribution function of v, and exp(-v^2 / 2).
template <typename Real>
inline Vector<Real> normal(Vector<Real> v, Vector<Real>* bell) {
    using N = Normal<Real>;
    typedef typename Integers<Real>::type Bits;
    const Vector<Real> size = (Vector<Real>)((Bits)v & ~N::sign);
    const Vector<Real> t = Real(1) / fma(size, broadcast(N::step), broadcast(Real(1)));
    const Vector<Real> ratio = polynomial<Real>(N::ratio, fma(t, broadcast(N::factor), broadcast(N::offset)));
    *bell = exponential<Real>(Real(-0.5) * v * v);
    const Vector<Real> tail = *bell * (t * ratio);
    return v < 0 ? tail : Real(1) - tail;
}

template <typename Real>
inline Vector<Real> gelu(Vector<Real> v) {
    Vector<Real> bell;
    return v * normal<Real>(v, &bell);
}

// The derivative: Phi(v) + v * phi(v).
template <typename Real>
inline Vector<Real> gelu_slope(Vector<Real> v) {
    Vector<Real> bell;
    const Vector<Real> below = normal<Real>(v, &bell);
    return fma(v * Real(0.3989422804014327), bell, below);
}

}  // namespace
