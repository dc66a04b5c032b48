// exp for vectors. Internal linkage, as all that a kernel file includes (see isa.h).
#pragma once

#include "simd.h"

namespace {

// exp(x) = 2^n exp(r) with |r| <= log(2) / 2: a polynomial with the least largest relative error. Adding kMagic rounds
// to an integer, and leaves n and the exponent's bias in the low bits. NaN stays NaN; below kLeast the result is
// 0. Above 88 (709) it is of no use.
template <typename Real>
struct Exponential;

// Within 2 units in the last place.
template <>
struct Exponential<float> {
    static constexpr int kMantissa = 23;
    static constexpr float kMagic = 0x1.8p23f + 127, kLeast = -87, kLog2e = 1.44269504f;
    static constexpr float kLog2High = 0x1.62e4p-1f, kLog2Low = 1.4286068203e-6f;
    static constexpr float kPolynomial[] = {0.0083125202352f, 0.0418901568388f, 0.16667114649f, 0.499992314952f, 1, 1};
};

template <>
struct Exponential<double> {
    static constexpr int kMantissa = 52;
    static constexpr double kMagic = 0x1.8p52 + 1023, kLeast = -708, kLog2e = 1.4426950408889634;
    static constexpr double kLog2High = 0x1.62e42fefap-1, kLog2Low = 1.6465949582897082e-12;
    static constexpr double kPolynomial[] = {
        2.5000061602835666699e-8, 2.7630248379211443975e-7, 2.7557586373840163694e-6, 2.4801493098906550659e-5,
        1.9841269506578687653e-4, 1.3888888943630112946e-3, 8.3333333334944616641e-3, 4.166666666653015859e-2,
        0.16666666666666412523,   0.50000000000000106271,   1,                        1};
};

template <typename Real>
inline ICSEG_INLINE Vector<Real> exponential(Vector<Real> x) {
    using E = Exponential<Real>;
    typedef typename Integers<Real>::type Bits;
    const Vector<Real> shifted = fma(x, broadcast<Real>(E::kLog2e), broadcast<Real>(E::kMagic));
    const Vector<Real> n = shifted - E::kMagic;
    Vector<Real> r = fma(n, broadcast<Real>(-E::kLog2High), x);
    r = fma(n, broadcast<Real>(-E::kLog2Low), r);
    Vector<Real> p = broadcast<Real>(E::kPolynomial[0]);
#pragma GCC unroll 12
    for (unsigned i = 1; i < sizeof(E::kPolynomial) / sizeof(Real); ++i) {
        p = fma(p, r, broadcast<Real>(E::kPolynomial[i]));
    }
    const Vector<Real> power = (Vector<Real>)((Bits)shifted << E::kMantissa);
    return x < E::kLeast ? Vector<Real>{} : p * power;
}

}  // namespace
