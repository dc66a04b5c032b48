#include "group_norm_film.h"

#include "../parallel.h"
#include "gelu.h"
#include "partial.h"
#include "simd.h"

#define ICSEG_INLINE __attribute__((always_inline))

namespace icseg {
namespace ICSEG_ISA {
namespace {

constexpr int64_t kTile = 1024;  // elements

struct Moments {
    double mean, squares;  // squares: sum of squared deviations from the mean
};

// Deviations from the mean of the block itself, then corrected for that mean's rounding.
template <typename Real>
inline Moments block_moments(const Real* x, int64_t count) {
    constexpr int64_t lanes = kLanes<Real>;
    const int64_t whole = count / lanes * lanes;
    Vector<Real> sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * lanes <= whole; i += 4 * lanes) {
        for (int k = 0; k < 4; ++k) sum[k] += load(x + i + k * lanes);
    }
    for (; i < whole; i += lanes) sum[0] += load(x + i);
    Real total = sum_of_lanes<Real>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < count; ++i) total += x[i];
    const Real middle = total / static_cast<Real>(count);

    Vector<Real> off[2] = {}, squared[2] = {};
    for (i = 0; i + 2 * lanes <= whole; i += 2 * lanes) {
        for (int k = 0; k < 2; ++k) {
            const Vector<Real> d = load(x + i + k * lanes) - middle;
            off[k] += d;
            squared[k] = fma(d, d, squared[k]);
        }
    }
    if (i < whole) {
        const Vector<Real> d = load(x + i) - middle;
        off[0] += d;
        squared[0] = fma(d, d, squared[0]);
        i += lanes;
    }
    double offset = sum_of_lanes<Real>(off[0] + off[1]), squares = sum_of_lanes<Real>(squared[0] + squared[1]);
    for (; i < count; ++i) {
        const double d = x[i] - middle;
        offset += d;
        squares += d * d;
    }
    return {middle + offset / count, squares - offset * offset / count};
}

// By blocks that stay in the cache between the two passes; NaN of no elements.
template <typename Real>
inline Moments moments(const Real* x, int64_t count) {
    constexpr int64_t block = 4 * kTile;
    Moments all = block_moments(x, smaller(count, block));
    for (int64_t first = block; first < count; first += block) {
        const int64_t more = smaller(block, count - first);
        const Moments next = block_moments(x + first, more);
        const double delta = next.mean - all.mean, share = static_cast<double>(more) / (first + more);
        all.mean += delta * share;
        all.squares += next.squares + delta * delta * first * share;
    }
    return all;
}

// A piece of a group of at most kTile elements: of one channel, or several whole channels that are shorter than a
// few vectors.
struct Tile {
    int64_t channel, channels, first, count;
};

template <typename Body>
inline void for_each_tile(int64_t channels, int64_t length, int64_t lanes, const Body& body) {
    if (length >= 4 * lanes || length % lanes == 0) {
        for (int64_t c = 0; c < channels; ++c) {
            for (int64_t i = 0; i < length; i += kTile) body(Tile{c, 1, c * length + i, smaller(kTile, length - i)});
        }
        return;
    }
    const int64_t most = kTile / length;
    for (int64_t c = 0; c < channels; c += most) {
        const int64_t some = smaller(most, channels - c);
        body(Tile{c, some, c * length, some * length});
    }
}

// What multiplies and what is added to every element of a tile.
template <typename Real>
struct Affine {
    alignas(64) Real gain[kTile];
    alignas(64) Real bias[kTile];

    // gain_of(c), bias_of(c): of a channel of the group.
    template <typename Gain, typename Bias>
    inline ICSEG_INLINE void fill(const Tile& tile, const Gain& gain_of, const Bias& bias_of) {
        if (tile.channels == 1) {
            gain[0] = gain_of(tile.channel);
            bias[0] = bias_of(tile.channel);
            return;
        }
        const int64_t length = tile.count / tile.channels;
        for (int64_t c = 0, i = 0; c < tile.channels; ++c) {
            const Real g = gain_of(tile.channel + c), b = bias_of(tile.channel + c);
            for (int64_t end = i + length; i < end; ++i) {
                gain[i] = g;
                bias[i] = b;
            }
        }
    }

    // body(i, count, gain, bias) for every vector: elements i to i + count of the tile.
    template <typename Body>
    inline ICSEG_INLINE void for_each_vector(const Tile& tile, const Body& body) const {
        constexpr int64_t lanes = kLanes<Real>;
        const bool same = tile.channels == 1;
        int64_t i = 0;
        if (same) {
            const Vector<Real> g = broadcast(gain[0]), b = broadcast(bias[0]);
            for (; i + lanes <= tile.count; i += lanes) body(i, lanes, g, b);
            if (i < tile.count) body(i, tile.count - i, g, b);
            return;
        }
        for (; i + lanes <= tile.count; i += lanes) body(i, lanes, load(gain + i), load(bias + i));
        if (i < tile.count) body(i, tile.count - i, load(gain + i), load(bias + i));  // past count: within the array
    }
};

template <typename Real>
inline Real of(const Film<Real>& film, int64_t sample, int64_t channel, Real otherwise) {
    return film.data ? film.data[sample * film.stride_sample + channel * film.stride_channel] : otherwise;
}

// One group: x and out are its elements.
template <bool activated, typename Real>
inline void normalise(const Real* x, Real* out, Real mean, Real rstd, const Film<Real>& gain, const Film<Real>& bias,
                      int64_t sample, int64_t channel, int64_t channels, int64_t length) {
    Affine<Real> affine;
    for_each_tile(channels, length, kLanes<Real>, [&](const Tile& tile) {
        affine.fill(
            tile, [&](int64_t c) { return rstd * of(gain, sample, channel + c, Real(1)); },
            [&](int64_t c) { return of(bias, sample, channel + c, Real(0)); });
        const Real* from = x + tile.first;
        Real* to = out + tile.first;
        affine.for_each_vector(
            tile, [&](int64_t i, int64_t count, Vector<Real> g, Vector<Real> b) ICSEG_INLINE {
                const Vector<Real> v = fma(load_up_to(from + i, count) - mean, g, b);
                store_up_to(to + i, activated ? gelu<Real>(v) : v, count);
            });
    });
}

// Sums of grad and of grad * (x - mean).
template <typename Real>
inline void sum_up(const Real* grad, const Real* x, Real mean, int64_t count, double* plain, double* weighted) {
    constexpr int64_t lanes = kLanes<Real>;
    Vector<Real> sum[2] = {}, product[2] = {};
    int64_t i = 0;
    for (; i + 2 * lanes <= count; i += 2 * lanes) {
        for (int k = 0; k < 2; ++k) {
            const Vector<Real> g = load(grad + i + k * lanes);
            sum[k] += g;
            product[k] = fma(g, load(x + i + k * lanes) - mean, product[k]);
        }
    }
    for (; i + lanes <= count; i += lanes) {
        const Vector<Real> g = load(grad + i);
        sum[0] += g;
        product[0] = fma(g, load(x + i) - mean, product[0]);
    }
    double s = 0, p = 0;
    if (i) {
        s = sum_of_lanes<Real>(sum[0] + sum[1]);
        p = sum_of_lanes<Real>(product[0] + product[1]);
    }
    for (; i < count; ++i) {
        s += grad[i];
        p += grad[i] * (x[i] - mean);
    }
    *plain += s;
    *weighted += p;
}

// One group: with v = gain * xhat + bias and d = grad * act'(v), the sums over a channel of d * xhat and d are the
// gradients of gain and bias; grad_x = rstd * (gain * d - mean(gain * d) - xhat * mean(gain * d * xhat)).
template <bool activated, typename Real>
inline void differentiate(const Real* grad, const Real* x, Real* grad_x, Real* grad_gain, Real* grad_bias, Real mean,
                          Real rstd, const Film<Real>& gain, const Film<Real>& bias, int64_t sample, int64_t channel,
                          int64_t channels, int64_t length) {
    Affine<Real> affine;
    const auto gain_of = [&](int64_t c) { return rstd * of(gain, sample, channel + c, Real(1)); };
    const auto bias_of = [&](int64_t c) { return of(bias, sample, channel + c, Real(0)); };
    const Real* inner = activated ? grad_x : grad;  // d
    for (int64_t c = 0; c < channels; ++c) grad_gain[c] = grad_bias[c] = 0;
    double all = 0, all_weighted = 0, plain = 0, weighted = 0;
    for_each_tile(channels, length, kLanes<Real>, [&](const Tile& tile) {
        if (activated) {
            affine.fill(tile, gain_of, bias_of);
            affine.for_each_vector(
                tile, [&](int64_t i, int64_t count, Vector<Real> g, Vector<Real> b) ICSEG_INLINE {
                    const int64_t at = tile.first + i;
                    const Vector<Real> v = fma(load_up_to(x + at, count) - mean, g, b);
                    store_up_to(grad_x + at, load_up_to(grad + at, count) * gelu_slope<Real>(v), count);
                });
        }
        const int64_t each = tile.count / tile.channels;
        for (int64_t k = 0; k < tile.channels; ++k) {
            const int64_t at = tile.first + k * each, c = tile.channel + k;
            sum_up(inner + at, x + at, mean, each, &plain, &weighted);
            if ((at + each) % length) continue;  // the channel goes on in the next tile
            grad_bias[c] = static_cast<Real>(plain);
            grad_gain[c] = static_cast<Real>(weighted * rstd);
            all += gain_of(c) * plain;
            all_weighted += gain_of(c) * weighted;
            plain = weighted = 0;
        }
    });
    const double count = static_cast<double>(channels) * length;
    const Real lowered = static_cast<Real>(all / count);
    const Real tilted = static_cast<Real>(all_weighted * rstd * rstd / count);
    for_each_tile(channels, length, kLanes<Real>, [&](const Tile& tile) {
        affine.fill(tile, gain_of, [&](int64_t) { return lowered; });
        affine.for_each_vector(
            tile, [&](int64_t i, int64_t some, Vector<Real> g, Vector<Real> b) ICSEG_INLINE {
                const int64_t at = tile.first + i;
                const Vector<Real> d = load_up_to(inner + at, some), off = load_up_to(x + at, some) - mean;
                store_up_to(grad_x + at, fma(g, d, -fma(off, broadcast(tilted), b)), some);
            });
    });
}

}  // namespace

template <typename Real>
void group_norm_film(const Real* x, const Film<Real>& gain, const Film<Real>& bias, Real* out, Real* stats,
                     const FilmSizes& s, double eps) {
    const int64_t all = s.samples * s.groups, channels = s.channels / s.groups, count = channels * s.length;
    parallel_for(all, 2 * s.bytes, [&](int64_t n) {
        const int64_t sample = n / s.groups, channel = n % s.groups * channels;
        const Moments found = moments(x + n * count, count);
        const Real mean = static_cast<Real>(found.mean);
        const Real rstd = static_cast<Real>(1 / __builtin_sqrt(found.squares / count + eps));
        stats[n] = mean;
        stats[all + n] = rstd;
        (s.gelu ? normalise<true, Real> : normalise<false, Real>)(x + n * count, out + n * count, mean, rstd, gain, bias,
                                                                  sample, channel, channels, s.length);
    });
}

template <typename Real>
void group_norm_film_backward(const Real* grad, const Real* x, const Real* stats, const Film<Real>& gain,
                              const Film<Real>& bias, Real* grad_x, Real* sums, const FilmSizes& s) {
    const int64_t all = s.samples * s.groups, channels = s.channels / s.groups, count = channels * s.length;
    Real *grad_gain = sums, *grad_bias = sums + s.samples * s.channels;
    parallel_for(all, 3 * s.bytes, [&](int64_t n) {
        const int64_t sample = n / s.groups, channel = n % s.groups * channels;
        (s.gelu ? differentiate<true, Real> : differentiate<false, Real>)(
            grad + n * count, x + n * count, grad_x + n * count, grad_gain + n * channels, grad_bias + n * channels,
            stats[n], stats[all + n], gain, bias, sample, channel, channels, s.length);
    });
}

#define ICSEG_FILM(Real)                                                                                             \
    template void group_norm_film<Real>(const Real*, const Film<Real>&, const Film<Real>&, Real*, Real*,           \
                                        const FilmSizes&, double);                                                   \
    template void group_norm_film_backward<Real>(const Real*, const Real*, const Real*, const Film<Real>&,         \
                                                 const Film<Real>&, Real*, Real*, const FilmSizes&);
ICSEG_FILM(float)
ICSEG_FILM(double)

}  // namespace ICSEG_ISA
}  // namespace icseg
