#include "small_convolutions.h"

#include "../parallel.h"
#include "simd.h"
#include "transpose.h"

namespace icseg {
namespace ICSEG_ISA {
namespace {

constexpr int64_t kLane = kLanes<float>;
static_assert(kChannelStep % kLane == 0, "the channels of a map are whole vectors");

// A tile is some pixels of an output row by one or two vectors of channels: what the registers hold, beside the weights.
#ifdef __AVX512F__
template <int64_t Vectors>
constexpr int64_t kMostPixels = 14;
#else
template <int64_t Vectors>
constexpr int64_t kMostPixels = 12 / Vectors;
#endif

// Channels [first, first + width) of a layer's output: two vectors, or the last one alone.
struct Panel {
    int64_t first, width;
};

template <typename Body>
inline void for_each_panel(int64_t channels, const Body& body) {
    int64_t first = 0;
    for (; first + kLane < channels; first += 2 * kLane) body(Panel{first, 2 * kLane});
    if (first < channels) body(Panel{first, kLane});
}

// Where a panel's weights lie, [kernel, kernel, in_channels, panel], and before them its bias, [panel].
inline int64_t packed_at(const Panel& panel, int64_t depth) { return panel.first * (depth + 1); }

void pack(const icseg_convolution& layer, float* packed) {
    const int64_t taps = layer.kernel * layer.kernel, depth = taps * layer.in_channels;
    for_each_panel(layer.out_channels, [&](const Panel& panel) {
        float* to = packed + packed_at(panel, depth);
        const int64_t given = smaller(panel.width, layer.out_channels - panel.first);
        for (int64_t i = 0; i < panel.width; ++i) to[i] = i < given && layer.bias ? layer.bias[panel.first + i] : 0.0f;
        to += panel.width;
        const float* from = layer.weight + panel.first * depth;
        for (int64_t tap = 0; tap < taps; ++tap) {
            for (int64_t c = 0; c < layer.in_channels; ++c, to += panel.width) {
                const float* of_tap = from + c * taps + tap;
                for (int64_t i = 0; i < given; ++i) to[i] = of_tap[i * depth];
                for (int64_t i = given; i < panel.width; ++i) to[i] = 0.0f;
            }
        }
    });
}

// What the tiles of a layer share, in elements.
struct Steps {
    int64_t rows, runs, length;  // a tile reads `rows` rows of its map, of each `runs` runs of `length` elements
    int64_t row, run;            // from one to the next
    int64_t pixel;               // from an output pixel to the next, in the map that is read
    int64_t out_pixel;           // and in that which is written
    float slope;
};

// Sums in the order of kernel rows, columns, channels, beginning with the bias: the same for every size of tile.
template <int64_t Vectors, int64_t Pixels>
void tile(const float* from, const float* packed, float* to, const Steps& steps) {
    constexpr int64_t kGroups = (Pixels + 3) / 4;  // four pixels are addressed from one pointer
    Vector<float> sum[Pixels][Vectors];
#pragma GCC unroll 16
    for (int64_t p = 0; p < Pixels; ++p) {
#pragma GCC unroll 2
        for (int64_t v = 0; v < Vectors; ++v) sum[p][v] = load(packed + v * kLane);
    }
    packed += Vectors * kLane;
    const int64_t pixel = steps.pixel, length = steps.length;
    for (int64_t y = 0; y < steps.rows; ++y, from += steps.row) {
        const float* run = from;
        for (int64_t x = 0; x < steps.runs; ++x, run += steps.run) {
            const float* group[kGroups];
#pragma GCC unroll 4
            for (int64_t g = 0; g < kGroups; ++g) group[g] = run + 4 * g * pixel;
            for (int64_t i = 0; i < length; ++i, packed += Vectors * kLane) {
                Vector<float> weight[Vectors];
#pragma GCC unroll 2
                for (int64_t v = 0; v < Vectors; ++v) weight[v] = load(packed + v * kLane);
#pragma GCC unroll 16
                for (int64_t p = 0; p < Pixels; ++p) {
                    const Vector<float> factor = broadcast(group[p / 4][p % 4 * pixel + i]);
#pragma GCC unroll 2
                    for (int64_t v = 0; v < Vectors; ++v) sum[p][v] = fma(factor, weight[v], sum[p][v]);
                }
            }
        }
    }
    const Vector<float> slope = broadcast(steps.slope);
#pragma GCC unroll 16
    for (int64_t p = 0; p < Pixels; ++p) {
#pragma GCC unroll 2
        for (int64_t v = 0; v < Vectors; ++v) {
            const Vector<float> value = sum[p][v];
            store(to + p * steps.out_pixel + v * kLane, value > 0 ? value : value * slope);
        }
    }
}

using Tile = void (*)(const float*, const float*, float*, const Steps&);

template <int64_t Vectors, int64_t Pixels = kMostPixels<Vectors>>
inline Tile tile_of(int64_t pixels) {
    if constexpr (Pixels > 1) {
        if (pixels < Pixels) return tile_of<Vectors, Pixels - 1>(pixels);
    }
    return tile<Vectors, Pixels>;
}

// One panel of a layer; rows are cut into tiles of as equal a size as can be.
template <int64_t Vectors>
void convolve_panel(const Map& from, const Map& to, int64_t stride, const float* map, const float* packed, float* out,
                    const Steps& steps) {
    const int64_t tiles = (to.width + kMostPixels<Vectors> - 1) / kMostPixels<Vectors>;
    const int64_t least = to.width / tiles, larger_ones = to.width % tiles;
    const Tile large = tile_of<Vectors>(least + (larger_ones > 0)), small = tile_of<Vectors>(least);
    for (int64_t y = 0; y < to.height; ++y) {
        const float* read = map + y * stride * from.row;
        float* written = out + y * to.row;
        for (int64_t n = 0; n < tiles; ++n) {
            const int64_t pixels = least + (n < larger_ones);
            (n < larger_ones ? large : small)(read, packed, written, steps);
            read += pixels * steps.pixel;
            written += pixels * steps.out_pixel;
        }
    }
}

// map: with its padding; out: where the first pixel of the output goes.
void convolve(const icseg_convolution& layer, const Map& from, const Map& to, const float* map, const float* packed,
              float* out) {
    const bool dense = from.pitch == from.channels;  // then the columns of a kernel's row are one run
    const int64_t channels = from.channels, kernel = layer.kernel;
    const Steps steps{kernel,     dense ? 1 : kernel, dense ? kernel * channels : channels, from.row,
                      from.pitch, layer.stride * from.pitch, to.pitch, static_cast<float>(layer.slope)};
    for_each_panel(layer.out_channels, [&](const Panel& panel) {
        const float* weights = packed + packed_at(panel, kernel * kernel * channels);
        (panel.width == kLane ? convolve_panel<1> : convolve_panel<2>)(from, to, layer.stride, map, weights,
                                                                      out + panel.first, steps);
    });
}

// Zeros, or the nearest pixels, around an image that lies in `map`.
void pad(const Map& m, bool replicate, float* map) {
    const int64_t row = m.row, side = m.padding * m.pitch, last = m.width * m.pitch;
    for (int64_t y = m.padding; y < m.padding + m.height; ++y) {
        float *left = map + y * row, *inside = left + side, *right = inside + last;
        if (!replicate) {
            std::memset(left, 0, side * sizeof(float));
            std::memset(right, 0, side * sizeof(float));
            continue;
        }
        for (int64_t i = 0; i < side; i += m.pitch) {
            std::memcpy(left + i, inside, m.pitch * sizeof(float));
            std::memcpy(right + i, right - m.pitch, m.pitch * sizeof(float));
        }
    }
    float *top = map, *bottom = map + (m.padding + m.height) * row;
    for (int64_t y = 0; y < m.padding; ++y, top += row, bottom += row) {
        if (!replicate) {
            std::memset(top, 0, row * sizeof(float));
            std::memset(bottom, 0, row * sizeof(float));
        } else {
            std::memcpy(top, map + m.padding * row, row * sizeof(float));
            std::memcpy(bottom, map + (m.padding + m.height - 1) * row, row * sizeof(float));
        }
    }
}

// An image of x into its map, channels last.
void read(const SmallConvolutions& call, const float* x, float* to) {
    const Map& m = call.maps[0];
    for (int64_t y = 0; y < m.height; ++y, x += call.stride_y, to += m.row) {
        if (call.stride_x == 1) {
            transpose(x, call.stride_channel, to, m.pitch, m.channels, m.width);
        } else if (call.stride_channel == 1) {
            for (int64_t i = 0; i < m.width; ++i) {
                std::memcpy(to + i * m.pitch, x + i * call.stride_x, m.channels * sizeof(float));
            }
        } else {
            for (int64_t i = 0; i < m.width; ++i) {
                for (int64_t c = 0; c < m.channels; ++c) {
                    to[i * m.pitch + c] = x[i * call.stride_x + c * call.stride_channel];
                }
            }
        }
    }
}

}  // namespace

void small_convolutions(const SmallConvolutions& call) {
    for (int64_t i = 0; i < call.count; ++i) pack(call.layers[i], call.workspace + call.packed[i]);
    const Map& last = call.maps[call.count];
    const int64_t pixels = last.height * last.width;
    parallel_for(call.slots, call.work, [&](int64_t slot) {
        float* even = call.workspace + call.packed[call.count] + slot * (call.even + call.odd);
        float* odd = even + call.even;
        const int64_t each = call.images / call.slots, more = call.images % call.slots;
        const int64_t first = slot * each + smaller(slot, more), end = first + each + (slot < more);
        for (int64_t n = first; n < end; ++n) {
            float *from = even, *to = odd;
            read(call, call.x + n * call.stride_image, from + call.maps[0].inside);
            for (int64_t i = 0; i < call.count; ++i) {
                const Map &map = call.maps[i], &next = call.maps[i + 1];
                if (map.padding) pad(map, call.layers[i].replicate != 0, from);
                convolve(call.layers[i], map, next, from, call.workspace + call.packed[i], to + next.inside);
                float* const free = from;
                from = to;
                to = free;
            }
            transpose(from, last.pitch, call.out + n * last.channels * pixels, pixels, pixels, last.channels);
        }
    });
}

}  // namespace ICSEG_ISA
}  // namespace icseg
