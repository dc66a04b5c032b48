// The kernels of sample_patches; sizes are checked, and no product or sum of them overflows.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace icseg {

// Elements; parts of the workspace begin at multiples of it, whole vectors of every instruction set.
constexpr int64_t kAlignment = 16;

// Columns that window_logits_backward pools back together.
constexpr int64_t kStrip = 64;

// Maps, the windows on them, and how the workspace is divided.
struct WindowGrid {
    int64_t batch, height, width, patch, stride, before, after, taps;
    int64_t padded_height, padded_width;
    int64_t every_rows, every_columns;  // windows at stride 1
    int64_t rows, columns;              // windows kept
    int64_t pitch;                      // elements a row of windows, in the workspace
    int64_t row_elements;               // a padded row, with room for whole vectors
    int64_t threads;
    int64_t slots;                      // samples at work at once
    int64_t slot_elements;              // workspace of a sample
    int64_t tasks;                      // bands at work at once
    int64_t task_elements;              // workspace of a band
    int64_t draws;
};

template <typename Real>
struct MapBatch {
    const Real* pixels;
    int64_t stride_batch, stride_y, stride_x;
};

// What turns rescaled maxima into logits.
template <typename Real>
struct Softening {
    const Real* taps;  // WindowGrid::taps of them
    Real temperature;
};

// Where the noise of the windows comes from, as in gumbel_topk.
template <typename Real>
struct WindowNoise {
    const Real* values;  // [batch, rows * columns] rows stride_batch apart, or null
    int64_t stride_batch;
    bool seeded;
    uint64_t seed;
};

// [batch, draws], [batch, draws, 2] of coords.
template <typename Real>
struct DrawnPatches {
    int64_t* indices;
    Real* scores;
    int32_t* coords;
};

ICSEG_KERNEL(template <typename Real>
             void sample_patches(const MapBatch<Real>& maps, const Softening<Real>& softening,
                                 const WindowNoise<Real>& noise, const WindowGrid& g, Real* workspace,
                                 const DrawnPatches<Real>& out))
ICSEG_KERNEL(template <typename Real>
             void window_logits_backward(const MapBatch<Real>& maps, const Real* grad_logits,
                                         const Softening<Real>& softening, const WindowGrid& g, Real* workspace,
                                         Real* grad_maps))

}  // namespace icseg
