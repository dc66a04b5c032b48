// Many divisions by one number. Internal linkage, as all that a kernel file includes (see isa.h).
#pragma once

#include "simd.h"

namespace {

template <typename Real>
struct DivisionRange;
template <>
struct DivisionRange<float> {
    static constexpr float smallest = 0x1p-93f, least = 0x1p-100f, most = 0x1p20f;
};
template <>
struct DivisionRange<double> {
    static constexpr double smallest = 0x1p-860, least = 0x1p-100, most = 0x1p100;
};

// x / value as IEEE rounds it. Where fused steps exist, a quotient off by less than a unit in the last place, then
// Markstein's correction (1990) of it by its exact remainder: right if no step underflows, which holds for x = 0 and
// x >= smallest, and least <= value <= most, and none overflows, which holds for a finite quotient.
template <typename Real>
struct Divisor {
    Real value, inverse, rest;  // 1 / value = inverse + rest
    bool in_range;

    explicit Divisor(Real by)
        : value(by),
          inverse(1 / by),
          rest(fma(-inverse, by, Real(1)) * inverse),
          in_range(by >= DivisionRange<Real>::least && by <= DivisionRange<Real>::most) {}

    Vector<Real> quotient(Vector<Real> x) const {
#ifdef __FMA__
        const Vector<Real> near = fma(x, broadcast(inverse), x * rest);
        return fma(fma(-near, broadcast(value), x), broadcast(inverse), near);
#else
        return x / value;
#endif
    }
};

// to[i] = (from[i] - offset) / divisor for 0 <= i < count, rounded twice; no difference is negative. `from` holds
// whole vectors, and is not `to`.
template <typename Real>
inline void divide_row(const Real* from, Real offset, const Divisor<Real>& divisor, int64_t count, Real* to) {
    constexpr int64_t n = kLanes<Real>;
    const int64_t whole = count - count % n;
    if (divisor.in_range) {
        Vector<Real> least = broadcast<Real>(1);
        const auto step = [&](int64_t x) {
            const Vector<Real> v = load(from + x) - offset;
            least = smaller(least, v == 0 ? broadcast<Real>(1) : v);
            return divisor.quotient(v);
        };
        for (int64_t x = 0; x < whole; x += n) store(to + x, step(x));
        if (whole < count) store_first(to + whole, step(whole), count - whole);
        Real lowest = least[0];
        for (int64_t i = 1; i < n; ++i) lowest = smaller<Real>(lowest, least[i]);
        if (lowest >= DivisionRange<Real>::smallest) return;
    }
    for (int64_t x = 0; x < whole; x += n) store(to + x, (load(from + x) - offset) / divisor.value);
    if (whole < count) store_first(to + whole, (load(from + whole) - offset) / divisor.value, count - whole);
}

}  // namespace
