#include "group_norm_film.h"

#include "../parallel.h"
#include "gelu.h"
#include "partial.h"
#include "simd.h"

namespace icseg {
namespace ICSEG_ISA {
namespace {

constexpr int64_t kTile = 1024;   // elements
constexpr int64_t kBlock = 4096;  // elements

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
    return {middle + offset / count, larger(squares - offset * offset / count, 0.0)};  // NaN stays NaN
}

// By blocks that stay in the first cache between the two passes; NaN of no elements.
template <typename Real>
inline Moments moments(const Real* x, int64_t count) {
    Moments all = block_moments(x, smaller(count, kBlock));
    for (int64_t first = kBlock; first < count; first += kBlock) {
        const int64_t more = smaller(kBlock, count - first);
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

template <typename Real, typename Body>
inline ICSEG_INLINE void for_each_tile(int64_t channels, int64_t length, const Body& body) {
    if (length >= 4 * kLanes<Real>) {
        for (int64_t c = 0; c < channels; ++c) {
            for (int64_t i = 0; i < length; i += kTile) body(Tile{c, 1, c * length + i, smaller(kTile, length - i)});
        }
        return;
    }
    const int64_t most = length ? kTile / length : channels;
    for (int64_t c = 0; c < channels; c += most) {
        const int64_t some = smaller(most, channels - c);
        body(Tile{c, some, c * length, some * length});
    }
}

template <typename Real>
inline Real of(const Film<Real>& film, int64_t sample, int64_t channel, Real otherwise) {
    return film.data ? film.data[sample * film.stride_sample + channel * film.stride_channel] : otherwise;
}

// Gain and bias of the elements of a tile, kept for the next one if that is of the same channels and they do not differ
// from sample to sample.
template <typename Real>
class Affine {
  public:
    // first: the group's first channel.
    Affine(const Film<Real>& gain, const Film<Real>& bias, int64_t first)
        : gain_(gain), bias_(bias), first_(first), shared_(gain.stride_sample == 0 && bias.stride_sample == 0) {}

    Real gain(int64_t sample, int64_t channel) const { return of(gain_, sample, first_ + channel, Real(1)); }
    Real bias(int64_t sample, int64_t channel) const { return of(bias_, sample, first_ + channel, Real(0)); }

    // body(i, count, gain, bias) for every vector: elements i to i + count of the tile.
    template <typename Body>
    inline ICSEG_INLINE void for_each_vector(int64_t sample, const Tile& tile, const Body& body) {
        constexpr int64_t lanes = kLanes<Real>;
        int64_t i = 0;
        if (tile.channels == 1) {
            const Vector<Real> g = broadcast(gain(sample, tile.channel)), b = broadcast(bias(sample, tile.channel));
            for (; i + lanes <= tile.count; i += lanes) body(i, lanes, g, b);
            if (i < tile.count) body(i, tile.count - i, g, b);
            return;
        }
        fill(shared_ ? 0 : sample, tile);
        for (; i + lanes <= tile.count; i += lanes) body(i, lanes, load(gains_ + i), load(biases_ + i));
        if (i < tile.count) body(i, tile.count - i, load(gains_ + i), load(biases_ + i));  // kTile is whole vectors
    }

  private:
    void fill(int64_t sample, const Tile& tile) {
        if (sample == filled_sample_ && tile.channel == filled_channel_) return;
        filled_sample_ = sample;
        filled_channel_ = tile.channel;
        const int64_t length = tile.count / tile.channels;
        for (int64_t c = 0, i = 0; c < tile.channels; ++c) {
            const Real g = gain(sample, tile.channel + c), b = bias(sample, tile.channel + c);
            for (int64_t end = i + length; i < end; ++i) {
                gains_[i] = g;
                biases_[i] = b;
            }
        }
    }

    const Film<Real>& gain_;
    const Film<Real>& bias_;
    const int64_t first_;
    const bool shared_;
    int64_t filled_sample_ = -1, filled_channel_ = -1;
    alignas(64) Real gains_[kTile];
    alignas(64) Real biases_[kTile];
};

// body(group, first, last) for every group and few enough samples, first to last, that they stay in the first cache.
template <typename Body>
inline void for_each_block(const FilmSizes& s, int64_t bytes, const Body& body) {
    const int64_t count = s.channels / s.groups * s.length;
    const int64_t most = clamped(count ? kBlock / count : kBlock, 1, 32);
    const int64_t blocks = s.samples / most + (s.samples % most != 0);
    parallel_for(blocks * s.groups, bytes, [&](int64_t n) {
        const int64_t first = n / s.groups * most;
        body(n % s.groups, first, smaller(first + most, s.samples));
    });
}

template <bool activated, typename Real>
inline void normalise(const Real* x, Real* out, Real mean, Real rstd, Affine<Real>& affine, int64_t sample,
                      int64_t channels, int64_t length) {
    for_each_tile<Real>(channels, length, [&](const Tile& tile) ICSEG_INLINE {
        const Real* from = x + tile.first;
        Real* to = out + tile.first;
        affine.for_each_vector(
            sample, tile, [&](int64_t i, int64_t count, Vector<Real> g, Vector<Real> b) ICSEG_INLINE {
                const Vector<Real> v = fma((load_up_to(from + i, count) - mean) * rstd, g, b);
                store_up_to(to + i, activated ? gelu<Real>(v) : v, count);
            });
    });
}

struct Sums {
    double plain, weighted;
};

// Of grad and of grad * (x - mean).
template <typename Real>
inline Sums sums_of(const Real* grad, const Real* x, Real mean, int64_t count) {
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
    Sums sums{0, 0};
    if (i) sums = {sum_of_lanes<Real>(sum[0] + sum[1]), sum_of_lanes<Real>(product[0] + product[1])};
    for (; i < count; ++i) {
        sums.plain += grad[i];
        sums.weighted += grad[i] * (x[i] - mean);
    }
    return sums;
}

// That of channels of four elements, which the compiler makes vectors of.
template <typename Real>
inline void sums_of_fours(const Real* grad, const Real* x, Real mean, int64_t channels, Real* plain, Real* weighted) {
    for (int64_t c = 0; c < channels; ++c, grad += 4, x += 4) {
        plain[c] = (grad[0] + grad[1]) + (grad[2] + grad[3]);
        weighted[c] = (grad[0] * (x[0] - mean) + grad[1] * (x[1] - mean)) +
                      (grad[2] * (x[2] - mean) + grad[3] * (x[3] - mean));
    }
}

// One group: with v = gain * xhat + bias and d = grad * act'(v), the sums over a channel of d * xhat and d are the
// gradients of gain and bias; grad_x = rstd * (gain * d - mean(gain * d) - xhat * mean(gain * d * xhat)).
template <bool activated, typename Real>
inline void differentiate(const Real* grad, const Real* x, Real* grad_x, Real* grad_gain, Real* grad_bias, Real mean,
                          Real rstd, Affine<Real>& affine, int64_t sample, int64_t channels, int64_t length) {
    if (length == 0) {  // then rstd is NaN
        for (int64_t c = 0; c < channels; ++c) grad_gain[c] = grad_bias[c] = 0;
        return;
    }
    const Real* inner = activated ? grad_x : grad;  // d
    double plain = 0, weighted = 0;
    for_each_tile<Real>(channels, length, [&](const Tile& tile) ICSEG_INLINE {
        if (activated) {
            affine.for_each_vector(
                sample, tile, [&](int64_t i, int64_t count, Vector<Real> g, Vector<Real> b) ICSEG_INLINE {
                    const int64_t at = tile.first + i;
                    const Vector<Real> v = fma((load_up_to(x + at, count) - mean) * rstd, g, b);
                    store_up_to(grad_x + at, load_up_to(grad + at, count) * gelu_slope<Real>(v), count);
                });
        }
        Real *of_gain = grad_gain + tile.channel, *of_bias = grad_bias + tile.channel;
        if (length == 4) {
            sums_of_fours(inner + tile.first, x + tile.first, mean, tile.channels, of_bias, of_gain);
            return;
        }
        const int64_t each = tile.count / tile.channels;
        for (int64_t k = 0, at = tile.first; k < tile.channels; ++k, at += each) {
            const Sums sums = sums_of(inner + at, x + at, mean, each);
            if (each == length) {
                of_bias[k] = static_cast<Real>(sums.plain);
                of_gain[k] = static_cast<Real>(sums.weighted);
                continue;
            }
            plain += sums.plain;
            weighted += sums.weighted;
            if ((at + each) % length) continue;  // the channel goes on in the next tile
            *of_bias = static_cast<Real>(plain);
            *of_gain = static_cast<Real>(weighted);
            plain = weighted = 0;
        }
    });
    double level[2] = {}, tilt[2] = {};  // two of each: the additions wait less for one another
    for (int64_t c = 0; c < channels; ++c) {
        const double g = affine.gain(sample, c);
        grad_gain[c] *= rstd;
        level[c % 2] += g * grad_bias[c];
        tilt[c % 2] += g * grad_gain[c];
    }
    const double share = 1 / (static_cast<double>(channels) * length);
    const Vector<Real> lowered = broadcast(static_cast<Real>((level[0] + level[1]) * share));
    const Vector<Real> tilted = broadcast(static_cast<Real>((tilt[0] + tilt[1]) * share * rstd));
    for_each_tile<Real>(channels, length, [&](const Tile& tile) ICSEG_INLINE {
        affine.for_each_vector(sample, tile, [&](int64_t i, int64_t some, Vector<Real> g, Vector<Real>) ICSEG_INLINE {
            const int64_t at = tile.first + i;
            const Vector<Real> d = load_up_to(inner + at, some), off = load_up_to(x + at, some) - mean;
            store_up_to(grad_x + at, rstd * fma(g, d, -fma(off, tilted, lowered)), some);
        });
    });
}

}  // namespace

template <typename Real>
void group_norm_film(const Real* x, const Film<Real>& gain, const Film<Real>& bias, Real* out, Real* stats,
                     const FilmSizes& s, double eps) {
    const int64_t channels = s.channels / s.groups, count = channels * s.length;
    Real *means = stats, *rstds = stats + s.samples * s.groups;
    for_each_block(s, 2 * s.bytes, [&](int64_t group, int64_t first, int64_t last) {
        for (int64_t sample = first; sample < last; ++sample) {
            const int64_t n = sample * s.groups + group;
            const Moments found = moments(x + n * count, count);
            means[n] = static_cast<Real>(found.mean);
            rstds[n] = static_cast<Real>(1 / __builtin_sqrt(found.squares / count + eps));
        }
        Affine<Real> affine(gain, bias, group * channels);
        for (int64_t sample = first; sample < last; ++sample) {
            const int64_t n = sample * s.groups + group;
            (s.gelu ? normalise<true, Real> : normalise<false, Real>)(
                x + n * count, out + n * count, means[n], rstds[n], affine, sample, channels, s.length);
        }
    });
}

template <typename Real>
void group_norm_film_backward(const Real* grad, const Real* x, const Real* stats, const Film<Real>& gain,
                              const Film<Real>& bias, Real* grad_x, Real* sums, const FilmSizes& s) {
    const int64_t channels = s.channels / s.groups, count = channels * s.length;
    const Real *means = stats, *rstds = stats + s.samples * s.groups;
    Real *grad_gain = sums, *grad_bias = sums + s.samples * s.channels;
    for_each_block(s, 3 * s.bytes, [&](int64_t group, int64_t first, int64_t last) {
        Affine<Real> affine(gain, bias, group * channels);
        for (int64_t sample = first; sample < last; ++sample) {
            const int64_t n = sample * s.groups + group;
            (s.gelu ? differentiate<true, Real> : differentiate<false, Real>)(
                grad + n * count, x + n * count, grad_x + n * count, grad_gain + n * channels, grad_bias + n * channels,
                means[n], rstds[n], affine, sample, channels, s.length);
        }
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
