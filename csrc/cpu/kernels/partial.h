// Vectors at the end of a row, and sums over a vector. Internal linkage, as all that a kernel file includes (isa.h).
#pragma once

#include "simd.h"

namespace {

// The whole vector if `count` is a vector's lanes, else its first `count` elements and zeros.
template <typename Real>
inline Vector<Real> load_up_to(const Real* from, int64_t count) {
    return count == kLanes<Real> ? load(from) : load_first(from, count);
}

template <typename Real>
inline void store_up_to(Real* to, Vector<Real> value, int64_t count) {
    count == kLanes<Real> ? store(to, value) : store_first(to, value, count);
}

// Added up in halves.
template <typename Real>
inline Real sum_of_lanes(Vector<Real> value) {
    return reduce<Real>(value, [](Real a, Real b) { return a + b; });
}

// The largest; not of NaN.
template <typename Real>
inline Real largest_of_lanes(Vector<Real> value) {
    return reduce<Real>(value, [](Real a, Real b) { return larger(a, b); });
}

#ifdef __AVX512F__
template <>
inline float largest_of_lanes<float>(Vector<float> value) { return _mm512_reduce_max_ps(value); }
template <>
inline double largest_of_lanes<double>(Vector<double> value) { return _mm512_reduce_max_pd(value); }
template <>
inline float sum_of_lanes<float>(Vector<float> value) { return _mm512_reduce_add_ps(value); }
template <>
inline double sum_of_lanes<double>(Vector<double> value) { return _mm512_reduce_add_pd(value); }
#endif

}  // namespace
