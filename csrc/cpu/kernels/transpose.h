// Transposes small rectangles. Internal linkage, as all that a kernel file includes (see isa.h).
#pragma once

#include "simd.h"

namespace {

#ifdef __AVX2__
// 8 x 8 elements of 4 bytes.
inline void transpose_tile(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
    __m256 rows[8], pairs[8], quads[8];
    for (int i = 0; i < 8; ++i) rows[i] = _mm256_loadu_ps(from + i * from_pitch);
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
        quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(to + i * to_pitch, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_pitch, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31));
    }
}
#elif defined(__SSE2__)
// 4 x 4 elements of 4 bytes.
inline void transpose_tile(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
    __m128 rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = _mm_loadu_ps(from + i * from_pitch);
    _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
    for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + i * to_pitch, rows[i]);
}
#endif

#ifdef __SSE2__
// 8 x 8 elements of 2 bytes.
inline void transpose_tile(const uint16_t* from, int64_t from_pitch, uint16_t* to, int64_t to_pitch) {
    __m128i rows[8], pairs[8], quads[8];
    for (int i = 0; i < 8; ++i) rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_pitch));
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm_unpacklo_epi16(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm_unpackhi_epi16(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        quads[i] = _mm_unpacklo_epi32(pairs[i], pairs[i + 2]);
        quads[i + 1] = _mm_unpackhi_epi32(pairs[i], pairs[i + 2]);
        quads[i + 2] = _mm_unpacklo_epi32(pairs[i + 1], pairs[i + 3]);
        quads[i + 3] = _mm_unpackhi_epi32(pairs[i + 1], pairs[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        __m128i* const even = reinterpret_cast<__m128i*>(to + 2 * i * to_pitch);
        __m128i* const odd = reinterpret_cast<__m128i*>(to + (2 * i + 1) * to_pitch);
        _mm_storeu_si128(even, _mm_unpacklo_epi64(quads[i], quads[i + 4]));
        _mm_storeu_si128(odd, _mm_unpackhi_epi64(quads[i], quads[i + 4]));
    }
}

// Elements a side of a tile; 0: none of this size.
template <typename Element>
constexpr int64_t kTile = sizeof(Element) == 2 ? 8 : sizeof(Element) != 4 ? 0 : kVectorBytes >= 32 ? 8 : 4;
#else
template <typename Element>
constexpr int64_t kTile = 0;
inline void transpose_tile(const void*, int64_t, void*, int64_t) {}
#endif

// What a tile's elements are handled as.
template <int kBytes>
struct BitsOf {
    using type = float;
};
template <>
struct BitsOf<2> {
    using type = uint16_t;
};

template <typename Element>
inline void transpose_scalars(const Element* from, int64_t from_pitch, Element* to, int64_t to_pitch, int64_t rows,
                              int64_t columns) {
    for (int64_t j = 0; j < columns; ++j) {
        for (int64_t i = 0; i < rows; ++i) to[j * to_pitch + i] = from[i * from_pitch + j];
    }
}

// to[j][i] = from[i][j] for i < rows, j < columns; a pitch is from row to row.
template <typename Element>
inline void transpose(const Element* from, int64_t from_pitch, Element* to, int64_t to_pitch, int64_t rows,
                      int64_t columns) {
    constexpr int64_t kSide = kTile<Element>;
    if constexpr (kSide == 0) {
        transpose_scalars(from, from_pitch, to, to_pitch, rows, columns);
    } else {
        using Bits = typename BitsOf<sizeof(Element)>::type;
        const int64_t whole_rows = rows - rows % kSide, whole_columns = columns - columns % kSide;
        for (int64_t j = 0; j < whole_columns; j += kSide) {
            for (int64_t i = 0; i < whole_rows; i += kSide) {
                transpose_tile(reinterpret_cast<const Bits*>(from + i * from_pitch + j), from_pitch,
                               reinterpret_cast<Bits*>(to + j * to_pitch + i), to_pitch);
            }
        }
        transpose_scalars(from + whole_rows * from_pitch, from_pitch, to + whole_rows, to_pitch, rows - whole_rows,
                          whole_columns);
        transpose_scalars(from + whole_columns, from_pitch, to + whole_columns * to_pitch, to_pitch, rows,
                          columns - whole_columns);
    }
}

}  // namespace
