// A softmax that may come in blocks. Internal linkage, as all that a kernel file includes (see isa.h).
#pragma once

#include "exponential.h"
#include "partial.h"
#include "simd.h"

namespace {

// std::exp(float) is a weak function of the standard library's headers: see isa.h.
inline float exp_of(float x) { return expf(x); }
inline double exp_of(double x) { return exp(x); }

// Scores of one query become exp(score - most), and 0 up to whole vectors; `most` and `total` are brought up to
// date. Returns the factor of what was summed before.
template <typename Real>
inline Real exponentials(Real* scores, int64_t count, Real& most, Real& total) {
    constexpr int64_t lanes = kLanes<Real>;
    constexpr Real infinity = static_cast<Real>(INFINITY);
    const int64_t whole = (count + lanes - 1) / lanes * lanes;
    if (count < whole) {  // as one vector: its load would wait for stores of single elements
        Vector<Real> place;
        for (int64_t i = 0; i < lanes; ++i) place[i] = static_cast<Real>(i);
        Real* last = scores + whole - lanes;
        store(last, place < static_cast<Real>(count - (whole - lanes)) ? load(last) : broadcast(-infinity));
    }
    Vector<Real> top = broadcast(most);
    for (int64_t j = 0; j < whole; j += lanes) top = larger(top, load(scores + j));  // NaN shows in the sum
    const Real before = most;
    most = largest_of_lanes<Real>(top);
    const Real origin = most == -infinity ? 0 : most;  // of no use against -inf: -inf - -inf is NaN
    Vector<Real> sum = {};
    for (int64_t j = 0; j < whole; j += lanes) {
        const Vector<Real> e = exponential<Real>(load(scores + j) - origin);
        store(scores + j, e);
        sum += e;
    }
    const Real factor = before == most ? 1 : before == -infinity ? 0 : exp_of(before - most);
    total = total * factor + sum_of_lanes<Real>(sum);
    return factor;
}

}  // namespace
