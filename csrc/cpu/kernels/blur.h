// A separable correlation of which only every stride-th output is kept, each summed from the first tap to the last.
// Internal linkage, as all that a kernel file includes (see isa.h).
#pragma once

#include "simd.h"

namespace {

// to[x] = sum over t of taps[t] * rows[t][x], for 0 <= x < count; rows hold whole vectors, `to` is written exactly.
template <typename Real>
inline void sum_taps(const Real* taps, int64_t tap_count, const Real* const* rows, int64_t count, Real* to) {
    constexpr int64_t n = kLanes<Real>;
    int64_t x = 0;
    for (; x + 4 * n <= count; x += 4 * n) {
        const Real* from = rows[0] + x;
        Vector<Real> a = load(from) * taps[0], b = load(from + n) * taps[0], c = load(from + 2 * n) * taps[0],
                     d = load(from + 3 * n) * taps[0];
        for (int64_t t = 1; t < tap_count; ++t) {
            from = rows[t] + x;
            const Vector<Real> tap = broadcast(taps[t]);
            a = a + load(from) * tap;
            b = b + load(from + n) * tap;
            c = c + load(from + 2 * n) * tap;
            d = d + load(from + 3 * n) * tap;
        }
        store(to + x, a);
        store(to + x + n, b);
        store(to + x + 2 * n, c);
        store(to + x + 3 * n, d);
    }
    for (; x < count; x += n) {
        Vector<Real> total = load(rows[0] + x) * taps[0];
        for (int64_t t = 1; t < tap_count; ++t) total = total + load(rows[t] + x) * taps[t];
        if (x + n <= count) {
            store(to + x, total);
        } else {
            store_first(to + x, total, count - x);
        }
    }
}

}  // namespace
