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

}  // namespace
