// The library's random numbers: Philox4x32-10 words and the Gumbel noise made of them, bit for bit those that
// icseg_kernels/philox.py defines. Compiled without contraction of multiplications and additions.
#pragma once

#include "launch.cuh"

namespace icseg_cuda {

// Where the noise of a row comes from: one of a seed, values or neither.
struct Noise {
    const float* values;  // of the row
    bool seeded;
    uint64_t seed;
    uint32_t row;
};

// The words of elements 4 * group ... 4 * group + 3; stream and offset are 0.
__device__ __forceinline__ void philox(const Noise& noise, uint32_t group, uint32_t (&words)[4]) {
    uint32_t c0 = group, c1 = noise.row, c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(noise.seed), k1 = static_cast<uint32_t>(noise.seed >> 32);
ICSEG_UNROLL
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0, b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(b);
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// The contract's log((1 + x) * 2^exponent).
__device__ __forceinline__ float log_mantissa(float x, float exponent) {
    const float z = x * x;
    float y = 7.0376836292e-2f;
    y = y * x + -1.1514610310e-1f;
    y = y * x + 1.1676998740e-1f;
    y = y * x + -1.2420140846e-1f;
    y = y * x + 1.4249322787e-1f;
    y = y * x + -1.6668057665e-1f;
    y = y * x + 2.0000714765e-1f;
    y = y * x + -2.4999993993e-1f;
    y = y * x + 3.3333331174e-1f;
    y = (y * x) * z;
    y = y + exponent * -2.12194440e-4f;
    y = y + z * -0.5f;
    return (x + y) + exponent * 0.693359375f;
}

// The mantissa, less one, and the exponent that log_mantissa takes for a normal x > 0.
__device__ __forceinline__ void split(float x, float& mantissa, float& exponent) {
    const int bits = __float_as_int(x);
    const float half = __int_as_float((bits & 0x007FFFFF) | 0x3F000000);
    const bool small = half < 0x1.6a09e6p-1f;
    mantissa = (small ? half + half : half) - 1.0f;
    exponent = static_cast<float>((bits >> 23) - 126 - (small ? 1 : 0));
}

// The contract's Gumbel noise of a random word.
__device__ __forceinline__ float gumbel(uint32_t word) {
    float v = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
    v = v < 1 - 0x1p-24f ? v : 1 - 0x1p-24f;
    float mantissa, exponent;
    split(1.0f - v, mantissa, exponent);
    const bool small = v < 0.28125f;
    const float exponential = -log_mantissa(small ? -v : mantissa, small ? 0.0f : exponent);
    split(exponential, mantissa, exponent);
    return -log_mantissa(mantissa, exponent);
}

}  // namespace icseg_cuda
