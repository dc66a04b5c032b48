// Small matrix products and transpositions, in registers. Internal linkage, as all that a kernel file includes.
#pragma once

#include "partial.h"
#include "simd.h"

namespace {

// A tile of a product is kTileRows rows by two vectors: what the registers hold, beside two vectors of the right factor.
#ifdef __AVX512F__
constexpr int64_t kTileRows = 12;
#else
constexpr int64_t kTileRows = 6;
#endif

// Columns of a tile, and of a panel: a right factor [depth, kPanel] of which a tile reads one row a step.
template <typename Real>
constexpr int64_t kPanel = 2 * kLanes<Real>;

// From one step to the next of a left factor whose columns are contiguous: kTileRows, up to whole vectors.
template <typename Real>
constexpr int64_t kTileStride = (kTileRows + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;

template <int64_t N>
struct Count {
    static constexpr int64_t value = N;
};

// body(Count<n>()) for the least n that the kernels know and that is at least `rows` <= kTileRows.
template <typename Body>
inline ICSEG_INLINE void for_rows(int64_t rows, const Body& body) {
    if (rows > kTileRows / 3 * 2) {
        body(Count<kTileRows>());
    } else if (rows > kTileRows / 3) {
        body(Count<kTileRows / 3 * 2>());
    } else {
        body(Count<kTileRows / 3>());
    }
}

// body(column, Count<vectors>()) for the columns [0, width), two vectors at a time and the last perhaps one.
template <typename Real, typename Body>
inline ICSEG_INLINE void for_columns(int64_t width, const Body& body) {
    int64_t column = 0;
    for (; column + kLanes<Real> < width; column += kPanel<Real>) body(column, Count<2>());
    if (column < width) body(column, Count<1>());
}

// sum[r][v] = left[r * RowStep + k * DepthStep] * right[k * stride + v * lanes], summed over k < depth.
template <int64_t RowStep, int64_t DepthStep, typename Real, int64_t Rows, int64_t Vectors>
inline ICSEG_INLINE void multiply(const Real* left, const Real* right, int64_t stride, int64_t depth,
                           Vector<Real> (&sum)[Rows][Vectors]) {
#pragma GCC unroll 12
    for (int64_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
        for (int64_t v = 0; v < Vectors; ++v) sum[r][v] = Vector<Real>{};
    }
    for (int64_t k = 0; k < depth; ++k, left += DepthStep, right += stride) {
        Vector<Real> column[Vectors];
#pragma GCC unroll 2
        for (int64_t v = 0; v < Vectors; ++v) column[v] = load(right + v * kLanes<Real>);
#pragma GCC unroll 12
        for (int64_t r = 0; r < Rows; ++r) {
            const Vector<Real> factor = broadcast(left[r * RowStep]);
#pragma GCC unroll 2
            for (int64_t v = 0; v < Vectors; ++v) sum[r][v] = fma(factor, column[v], sum[r][v]);
        }
    }
}

// to[d * stride + r] = rows[r][d] * factor for d < depth. Columns from `count` up to whole vectors are zero.
template <typename Real>
inline void transpose(const Real* const* rows, int64_t count, int64_t depth, Real factor, Real* to, int64_t stride) {
    constexpr int64_t lanes = kLanes<Real>;
    for (int64_t r = 0; r < count; r += lanes) {
        for (int64_t d = 0; d < depth; d += lanes) {
            const int64_t width = smaller(lanes, depth - d);
            Vector<Real> x[lanes], y[lanes];
            for (int64_t i = 0; i < lanes; ++i) {
                x[i] = r + i < count ? load_up_to(rows[r + i] + d, width) : Vector<Real>{};
            }
            // Each round of interleaving rotates the bits of (row, column) by one.
#pragma GCC unroll 4
            for (int64_t round = 1; round < lanes; round *= 2) {
#pragma GCC unroll 8
                for (int64_t i = 0; i < lanes / 2; ++i) {
                    interleave<Real>(x[i], x[i + lanes / 2], y[2 * i], y[2 * i + 1]);
                }
#pragma GCC unroll 16
                for (int64_t i = 0; i < lanes; ++i) x[i] = y[i];
            }
            for (int64_t i = 0; i < width; ++i) store(to + (d + i) * stride + r, x[i] * factor);
        }
    }
}

}  // namespace
