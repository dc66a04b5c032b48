// The library's random numbers: Philox4x32-10 words and the Gumbel noise made of them, bit for bit those that
// icseg_kernels/philox.py defines. Internal linkage, as all that a kernel file includes (see isa.h).
#pragma once

#include "simd.h"

namespace {

// Where the noise of a row comes from: all of the counter but the element, and the key.
struct Stream {
    uint64_t seed;
    uint32_t row, stream, offset;
};

// The product of the lower halves.
inline Vector<uint64_t> multiply_low(Vector<uint64_t> a, uint32_t b) {
    const Vector<uint64_t> factor = broadcast<uint64_t>(b);
#if defined(__AVX512F__)
    return (Vector<uint64_t>)_mm512_mul_epu32((__m512i)a, (__m512i)factor);
#elif defined(__AVX2__)
    return (Vector<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#elif defined(__SSE2__)
    return (Vector<uint64_t>)_mm_mul_epu32((__m128i)a, (__m128i)factor);
#else
    return (a & 0xFFFFFFFF) * factor;
#endif
}

// The upper halves, in place of the lower ones; what is above them means nothing. A shuffle leaves the ports that
// multiply alone.
inline Vector<uint64_t> upper(Vector<uint64_t> a) {
#if defined(__AVX512F__)
    return (Vector<uint64_t>)_mm512_shuffle_epi32((__m512i)a, (_MM_PERM_ENUM)0xF5);
#elif defined(__AVX2__)
    return (Vector<uint64_t>)_mm256_shuffle_epi32((__m256i)a, 0xF5);
#elif defined(__SSE2__)
    return (Vector<uint64_t>)_mm_shuffle_epi32((__m128i)a, 0xF5);
#else
    return a >> 32;
#endif
}

// Elements whose words one pass makes: two vectors of 64-bit lanes, each lane a group of four elements.
constexpr int64_t kGroupLanes = kLanes<uint64_t>;
constexpr int64_t kPassElements = 2 * 4 * kGroupLanes;

// The four words of each group, of which the upper halves mean nothing, to their elements' places. Lane 2 i + j holds
// group kGroupLanes / 2 * j + i, so that interleaving within 128 bits is all it takes.
inline void store_words(uint32_t* to, Vector<uint64_t> c0, Vector<uint64_t> c1, Vector<uint64_t> c2,
                        Vector<uint64_t> c3) {
    const Vector<uint64_t> first = (c0 & 0xFFFFFFFF) | (c1 << 32), second = (c2 & 0xFFFFFFFF) | (c3 << 32);
#if defined(__AVX512F__)
    _mm512_storeu_si512(to, _mm512_unpacklo_epi64((__m512i)first, (__m512i)second));
    _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi64((__m512i)first, (__m512i)second));
#elif defined(__AVX2__)
    _mm256_storeu_si256((__m256i*)to, _mm256_unpacklo_epi64((__m256i)first, (__m256i)second));
    _mm256_storeu_si256((__m256i*)(to + 8), _mm256_unpackhi_epi64((__m256i)first, (__m256i)second));
#else
    for (int64_t lane = 0; lane < kGroupLanes; ++lane) {
        const uint64_t pair[2] = {first[lane], second[lane]};
        for (int j = 0; j < 4; ++j) to[4 * lane + j] = static_cast<uint32_t>(pair[j / 2] >> 32 * (j % 2));
    }
#endif
}

// The words of elements [first, first + kPassElements), of which first is a multiple of 4.
inline void philox_pass(const Stream& s, int64_t first, uint32_t* words) {
    constexpr uint32_t kMultiply0 = 0xD2511F53, kMultiply1 = 0xCD9E8D57, kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
    Vector<uint64_t> c0[2], c1[2], c2[2], c3[2];
    for (int64_t lane = 0; lane < kGroupLanes; ++lane) {
        c0[0][lane] = static_cast<uint64_t>(kGroupLanes / 2 * (lane % 2) + lane / 2);
    }
    c0[0] += static_cast<uint64_t>(first / 4);
    c0[1] = c0[0] + static_cast<uint64_t>(kGroupLanes);
    for (int i = 0; i < 2; ++i) {
        c1[i] = broadcast<uint64_t>(s.row);
        c2[i] = broadcast<uint64_t>(s.stream);
        c3[i] = broadcast<uint64_t>(s.offset);
    }
    uint32_t k0 = static_cast<uint32_t>(s.seed), k1 = static_cast<uint32_t>(s.seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += kWeyl0, k1 += kWeyl1) {
        for (int i = 0; i < 2; ++i) {
            const Vector<uint64_t> product0 = multiply_low(c0[i], kMultiply0);
            const Vector<uint64_t> product1 = multiply_low(c2[i], kMultiply1);
            c0[i] = upper(product1) ^ c1[i] ^ broadcast<uint64_t>(k0);
            c1[i] = product1;
            c2[i] = upper(product0) ^ c3[i] ^ broadcast<uint64_t>(k1);
            c3[i] = product0;
        }
    }
    for (int i = 0; i < 2; ++i) store_words(words + i * 4 * kGroupLanes, c0[i], c1[i], c2[i], c3[i]);
}

// The words of elements [first, first + count): first a multiple of 4, count one of kPassElements.
inline void philox(const Stream& s, int64_t first, int64_t count, uint32_t* words) {
    for (int64_t i = 0; i < count; i += kPassElements) philox_pass(s, first + i, words + i);
}

// So many vectors of noise are made at a time: an addition waits for a multiplication, which waits for an addition.
constexpr int kChains = 4;
constexpr int64_t kGumbels = kChains * kLanes<float>;
typedef Vector<float> Chains[kChains];

// The contract's log((1 + x) * 2^exponent): each operation rounded by itself, none contracted.
inline void log_mantissa(const Chains& x, const Chains& exponent, Chains& log) {
    constexpr float kCoefficients[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                                       -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
    Chains y;
    for (int i = 0; i < kChains; ++i) y[i] = broadcast(7.0376836292e-2f);
    for (const float c : kCoefficients) {
        for (int i = 0; i < kChains; ++i) y[i] = y[i] * x[i] + c;
    }
    for (int i = 0; i < kChains; ++i) {
        const Vector<float> z = x[i] * x[i];
        y[i] = (y[i] * x[i]) * z;
        y[i] = y[i] + exponent[i] * -2.12194440e-4f;
        y[i] = y[i] + z * -0.5f;
        log[i] = (x[i] + y[i]) + exponent[i] * 0.693359375f;
    }
}

// The mantissa, less one, and the exponent that log_mantissa takes for a normal x > 0.
inline void split(Vector<float> x, Vector<float>& mantissa, Vector<float>& exponent) {
    const Vector<int32_t> bits = (Vector<int32_t>)x;
    const Vector<float> half = (Vector<float>)((bits & 0x007FFFFF) | 0x3F000000);
    const Vector<int32_t> small = half < 0x1.6a09e6p-1f;  // -1 where it holds
    mantissa = (small ? half + half : half) - 1.0f;
    exponent = __builtin_convertvector((bits >> 23) - 126 + small, Vector<float>);
}

// To the nearest, ties to even: both halves are exact, so only their sum is rounded.
inline Vector<float> from_unsigned(Vector<uint32_t> x) {
    const Vector<float> high = __builtin_convertvector((Vector<int32_t>)(x >> 16), Vector<float>);
    const Vector<float> low = __builtin_convertvector((Vector<int32_t>)(x & 0xFFFF), Vector<float>);
    return high * 65536.0f + low;
}

// The contract's Gumbel noise of kGumbels random words.
inline void gumbel(const uint32_t* words, float* noise) {
    const Vector<float> most = broadcast(1 - 0x1p-24f);
    Chains mantissa, exponent, log;
    for (int i = 0; i < kChains; ++i) {
        const Vector<float> u = (from_unsigned(load(words + i * kLanes<float>)) + 0.5f) * 0x1p-32f;
        const Vector<float> v = u < most ? u : most;
        split(1.0f - v, mantissa[i], exponent[i]);
        const Vector<int32_t> small = v < 0.28125f;
        mantissa[i] = small ? -v : mantissa[i];
        exponent[i] = small ? Vector<float>{} : exponent[i];
    }
    log_mantissa(mantissa, exponent, log);
    for (int i = 0; i < kChains; ++i) split(-log[i], mantissa[i], exponent[i]);
    log_mantissa(mantissa, exponent, log);
    for (int i = 0; i < kChains; ++i) store(noise + i * kLanes<float>, -log[i]);
}

}  // namespace
