// Transposes small rectangles. Internal linkage, as all that a kernel file includes (see isa.h).
#pragma once

#include "simd.h"

namespace {

#ifdef __AVX__
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
constexpr int64_t kTile = 8;
#elif defined(__SSE2__)
inline void transpose_tile(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
    __m128 rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = _mm_loadu_ps(from + i * from_pitch);
    _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
    for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + i * to_pitch, rows[i]);
}
constexpr int64_t kTile = 4;
#endif

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
#ifdef __SSE2__
    if constexpr (sizeof(Element) == sizeof(float)) {
        const int64_t whole_rows = rows - rows % kTile, whole_columns = columns - columns % kTile;
        for (int64_t j = 0; j < whole_columns; j += kTile) {
            for (int64_t i = 0; i < whole_rows; i += kTile) {
                transpose_tile(reinterpret_cast<const float*>(from + i * from_pitch + j), from_pitch,
                               reinterpret_cast<float*>(to + j * to_pitch + i), to_pitch);
            }
        }
        transpose_scalars(from + whole_rows * from_pitch, from_pitch, to + whole_rows, to_pitch, rows - whole_rows,
                          whole_columns);
        transpose_scalars(from + whole_columns, from_pitch, to + whole_columns * to_pitch, to_pitch, rows,
                          columns - whole_columns);
        return;
    }
#endif
    transpose_scalars(from, from_pitch, to, to_pitch, rows, columns);
}

}  // namespace
