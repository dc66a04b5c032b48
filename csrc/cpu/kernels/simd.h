// Vectors of the instruction set that a kernel file is compiled for. Everything here has internal linkage (see isa.h).
//
// The arithmetic operators, comparisons and `mask ? a : b` are the compiler's own. Nothing is contracted: a
// fused multiply-add happens only where `fma` is written, so what is written without it has the same bits everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 holds the undefined lanes that its own AVX-512 intrinsics begin with for mistakes (bug 105593). It reports
// them where the intrinsics are inlined, so a push and pop around the header does not help.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

// Of functions and lambdas that take vectors, which would travel through memory.
#define ICSEG_INLINE __attribute__((always_inline))

#ifndef ICSEG_ISA
#error "a kernel file is compiled with -DICSEG_ISA=portable, avx2 or avx512"
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// A vector of so many elements (a power of two), and its loads and stores.
template <typename Element, int64_t kCount>
struct SomeOf {
    typedef Element type __attribute__((vector_size(kCount * sizeof(Element))));
    typedef Element unaligned
        __attribute__((vector_size(kCount * sizeof(Element)), aligned(alignof(Element)), may_alias));
};
template <typename Element, int64_t kCount>
using Some = typename SomeOf<Element, kCount>::type;

template <int64_t kCount, typename Element>
inline Some<Element, kCount> get(const Element* from) {
    return *reinterpret_cast<const typename SomeOf<Element, kCount>::unaligned*>(from);
}

template <int64_t kCount, typename Element>
inline void put(Element* to, Some<Element, kCount> value) {
    *reinterpret_cast<typename SomeOf<Element, kCount>::unaligned*>(to) = value;
}

// Elements in a vector of the instruction set.
template <typename Element>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(Element));

template <typename Element>
using Vector = Some<Element, kLanes<Element>>;

template <typename Element>
inline Vector<Element> load(const Element* from) {
    return get<kLanes<Element>>(from);
}

template <typename Element>
inline void store(Element* to, Vector<Element> value) {
    put<kLanes<Element>>(to, value);
}

// The first `count` elements, 0 <= count < lanes; zeros beyond. Of none, `from` may be null.
template <typename Element>
inline Vector<Element> load_first(const Element* from, int64_t count) {
#ifdef __AVX512F__
    if constexpr (sizeof(Element) == 4) return (Vector<Element>)_mm512_maskz_loadu_epi32((1u << count) - 1, from);
    if constexpr (sizeof(Element) == 8) return (Vector<Element>)_mm512_maskz_loadu_epi64((1u << count) - 1, from);
#endif
    Vector<Element> value = {};
    if (count > 0) std::memcpy(&value, from, count * sizeof(Element));  // memcpy wants a pointer even then
    return value;
}

template <typename Element>
inline void store_first(Element* to, Vector<Element> value, int64_t count) {
#ifdef __AVX512F__
    if constexpr (sizeof(Element) == 4) return _mm512_mask_storeu_epi32(to, (1u << count) - 1, (__m512i)value);
    if constexpr (sizeof(Element) == 8) return _mm512_mask_storeu_epi64(to, (1u << count) - 1, (__m512i)value);
#endif
    if (count > 0) std::memcpy(to, &value, count * sizeof(Element));
}

template <typename Element>
inline Vector<Element> broadcast(Element value) {
    return value - Vector<Element>{};
}

// a * b + c, rounded once where the instruction exists.
#ifdef __FMA__
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
inline float fma(float a, float b, float c) { return a * b + c; }
inline double fma(double a, double b, double c) { return a * b + c; }
#endif
#if defined(__AVX512F__)
inline Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__FMA__)
inline Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) { return _mm256_fmadd_pd(a, b, c); }
#else
inline Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) { return a * b + c; }
inline Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) { return a * b + c; }
#endif

template <typename Element>
inline Element smaller(Element a, Element b) { return b < a ? b : a; }
template <typename Element>
inline Element larger(Element a, Element b) { return a < b ? b : a; }
// Of two vectors, lane by lane: the larger, `a` if they are equal (or one is NaN: then `a` too); `smaller` likewise.
#if defined(__AVX512F__)
inline Vector<float> larger(Vector<float> a, Vector<float> b) { return _mm512_max_ps(b, a); }
inline Vector<double> larger(Vector<double> a, Vector<double> b) { return _mm512_max_pd(b, a); }
inline Vector<float> smaller(Vector<float> a, Vector<float> b) { return _mm512_min_ps(b, a); }
inline Vector<double> smaller(Vector<double> a, Vector<double> b) { return _mm512_min_pd(b, a); }
#elif defined(__AVX2__)
inline Vector<float> larger(Vector<float> a, Vector<float> b) { return _mm256_max_ps(b, a); }
inline Vector<double> larger(Vector<double> a, Vector<double> b) { return _mm256_max_pd(b, a); }
inline Vector<float> smaller(Vector<float> a, Vector<float> b) { return _mm256_min_ps(b, a); }
inline Vector<double> smaller(Vector<double> a, Vector<double> b) { return _mm256_min_pd(b, a); }
#elif defined(__SSE2__)
inline Vector<float> larger(Vector<float> a, Vector<float> b) { return _mm_max_ps(b, a); }
inline Vector<double> larger(Vector<double> a, Vector<double> b) { return _mm_max_pd(b, a); }
inline Vector<float> smaller(Vector<float> a, Vector<float> b) { return _mm_min_ps(b, a); }
inline Vector<double> smaller(Vector<double> a, Vector<double> b) { return _mm_min_pd(b, a); }
#else
inline Vector<float> larger(Vector<float> a, Vector<float> b) { return b > a ? b : a; }
inline Vector<double> larger(Vector<double> a, Vector<double> b) { return b > a ? b : a; }
inline Vector<float> smaller(Vector<float> a, Vector<float> b) { return b < a ? b : a; }
inline Vector<double> smaller(Vector<double> a, Vector<double> b) { return b < a ? b : a; }
#endif

inline int64_t clamped(int64_t value, int64_t least, int64_t most) { return smaller(larger(value, least), most); }

// Signed integers as wide as the elements, for shuffles, comparisons and bits.
template <typename Element>
struct Integers;
template <>
struct Integers<float> {
    typedef Vector<int32_t> type;
};
template <>
struct Integers<double> {
    typedef Vector<int64_t> type;
};

// The elements combined in pairs, then the pairs, ...: a fixed order.
template <typename Element, typename Operation>
inline Element reduce(Vector<Element> value, const Operation& operation) {
    Element element[kLanes<Element>];
    std::memcpy(element, &value, sizeof(value));
#pragma GCC unroll 4
    for (int64_t half = kLanes<Element> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < half; ++i) element[i] = operation(element[i], element[i + half]);
    }
    return element[0];
}

#ifdef __clang__
#define ICSEG_SHUFFLE(Real, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ICSEG_SHUFFLE(Real, a, b, ...) __builtin_shuffle(a, b, typename Integers<Real>::type{__VA_ARGS__})
#endif

// a0 b0 a1 b1 ..., the first halves and the second.
template <typename Real>
inline ICSEG_INLINE void interleave(Vector<Real> a, Vector<Real> b, Vector<Real>& first, Vector<Real>& second) {
    if constexpr (kLanes<Real> == 2) {
        first = ICSEG_SHUFFLE(Real, a, b, 0, 2);
        second = ICSEG_SHUFFLE(Real, a, b, 1, 3);
    } else if constexpr (kLanes<Real> == 4) {
        first = ICSEG_SHUFFLE(Real, a, b, 0, 4, 1, 5);
        second = ICSEG_SHUFFLE(Real, a, b, 2, 6, 3, 7);
    } else if constexpr (kLanes<Real> == 8) {
        first = ICSEG_SHUFFLE(Real, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
        second = ICSEG_SHUFFLE(Real, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    } else {
        first = ICSEG_SHUFFLE(Real, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        second = ICSEG_SHUFFLE(Real, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
}

// The reverse: of the two vectors a and b, one after the other, the elements at even places and those at odd ones.
template <typename Real>
inline ICSEG_INLINE void deinterleave(Vector<Real> a, Vector<Real> b, Vector<Real>& even, Vector<Real>& odd) {
    if constexpr (kLanes<Real> == 2) {
        even = ICSEG_SHUFFLE(Real, a, b, 0, 2);
        odd = ICSEG_SHUFFLE(Real, a, b, 1, 3);
    } else if constexpr (kLanes<Real> == 4) {
        even = ICSEG_SHUFFLE(Real, a, b, 0, 2, 4, 6);
        odd = ICSEG_SHUFFLE(Real, a, b, 1, 3, 5, 7);
    } else if constexpr (kLanes<Real> == 8) {
        even = ICSEG_SHUFFLE(Real, a, b, 0, 2, 4, 6, 8, 10, 12, 14);
        odd = ICSEG_SHUFFLE(Real, a, b, 1, 3, 5, 7, 9, 11, 13, 15);
    } else {
        even = ICSEG_SHUFFLE(Real, a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        odd = ICSEG_SHUFFLE(Real, a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    }
}

inline float square_root(float a) { return __builtin_sqrtf(a); }
#if defined(__AVX512F__)
inline Vector<float> square_root(Vector<float> a) { return _mm512_sqrt_ps(a); }
#elif defined(__AVX2__)
inline Vector<float> square_root(Vector<float> a) { return _mm256_sqrt_ps(a); }
#elif defined(__SSE2__)
inline Vector<float> square_root(Vector<float> a) { return _mm_sqrt_ps(a); }
#else
inline Vector<float> square_root(Vector<float> a) {
    for (int64_t i = 0; i < kLanes<float>; ++i) a[i] = square_root(a[i]);
    return a;
}
#endif

}  // namespace
