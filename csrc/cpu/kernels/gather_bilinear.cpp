// Bilinear gather_patches: interpolation along x of the rows that a patch needs, each once, then along y.
#include "gather_patches.h"
#include "gather_work.h"
#include "simd.h"
#include "transpose.h"

namespace icseg {
namespace ICSEG_ISA {
namespace {

// Samples a side of the part of a patch whose neighbours are looked up at once.
constexpr int64_t kSide = 64;

template <typename Real>
struct IndexOf;
template <>
struct IndexOf<float> {
    using type = int32_t;
};
template <>
struct IndexOf<double> {
    using type = int64_t;
};

// The two pixels that a sample lies between, and how far towards the second; low < 0: nowhere.
template <typename Real>
struct Tap {
    int64_t low, high;
    Real fraction;
};

// The samples of a patch along one axis.
template <typename Real>
class Axis {
   public:
    using Index = typename IndexOf<Real>::type;

    Axis(double corner, double extent, int64_t samples, bool edge_to_edge, int64_t length)
        : inside_(corner > -extent && corner < static_cast<double>(length)),
          start_(static_cast<Real>(corner)),
          extent_(static_cast<Real>(extent)),
          middle_(static_cast<Real>(extent / 2 - 0.5)),
          samples_(static_cast<Real>(samples)),
          steps_(static_cast<Real>(samples > 1 ? samples - 1 : 1)),
          edge_to_edge_(edge_to_edge),
          last_(length - 1),
          regular_(inside_ && corner > -kMostRegular && extent > 0 && extent < kMostRegular &&
                   length <= kMostRegular) {}

    // Whether the patch and the image overlap.
    bool inside() const { return inside_; }

    // Whether every position is a number, they ascend, and every pixel's number fits an index of a vector.
    bool regular() const { return regular_; }

    int64_t last() const { return last_; }

    Tap<Real> tap(int64_t i) const {
        const Real found = position(static_cast<Real>(i)), most = static_cast<Real>(last_);
        if (found != found) return {-1, -1, 0};
        const Real place = smaller(larger(found, Real(0)), most);
        const int64_t low = smaller(static_cast<int64_t>(place), last_);  // `most` may have been rounded up
        return {low, smaller(low + 1, last_), place - static_cast<Real>(low)};
    }

    // The same of a vector of samples from `first` on, if regular().
    void taps(int64_t first, Vector<Index>& low, Vector<Real>& fraction) const {
        Vector<Real> number;
        for (int64_t l = 0; l < kLanes<Real>; ++l) number[l] = static_cast<Real>(l);
        const Vector<Real> zero = {}, most = broadcast(static_cast<Real>(last_));
        const Vector<Index> end = broadcast(static_cast<Index>(last_));
        Vector<Real> place = position(number + static_cast<Real>(first));
        place = place > zero ? place : zero;
        place = place < most ? place : most;
        low = __builtin_convertvector(place, Vector<Index>);
        low = low < end ? low : end;
        fraction = place - __builtin_convertvector(low, Vector<Real>);
    }

   private:
    static constexpr int64_t kMostRegular = int64_t(1) << 30;

    // Of samples of these numbers, in the order of the reference, so that its bits are the same.
    template <typename Number>
    Number position(Number number) const {
        if (edge_to_edge_) return (2 * number - steps_) / (2 * steps_) * extent_ + middle_ + start_;
        return (number + Real(0.5)) * extent_ / samples_ - Real(0.5) + start_;
    }

    bool inside_;
    Real start_, extent_, middle_, samples_, steps_;
    bool edge_to_edge_;
    int64_t last_;
    bool regular_;
};

// The samples of a part of a patch along y; low < 0: nowhere.
template <typename Real>
struct Rows {
    int64_t first, count, last_pixel;
    int64_t low[kSide];
    Real fraction[kSide];

    Tap<Real> operator[](int64_t i) const { return {low[i], smaller(low[i] + 1, last_pixel), fraction[i]}; }
};

template <typename Real>
inline void fill_rows(const Axis<Real>& axis, Rows<Real>& rows) {
    rows.last_pixel = axis.last();
    if (!axis.regular()) {
        for (int64_t i = 0; i < rows.count; ++i) {
            const Tap<Real> tap = axis.tap(rows.first + i);
            rows.low[i] = tap.low, rows.fraction[i] = tap.fraction;
        }
        return;
    }
    for (int64_t i = 0; i < rows.count; i += kLanes<Real>) {
        Vector<typename Axis<Real>::Index> low;
        Vector<Real> fraction;
        axis.taps(rows.first + i, low, fraction);
        for (int64_t l = 0; l < kLanes<Real>; ++l) rows.low[i + l] = low[l];
        store(rows.fraction + i, fraction);
    }
}

// How the pixels of a chunk of samples are reached.
enum class Reach {
    window,  // contiguous, and within two vectors
    near,    // contiguous
    any,     // by `low` and `high`
};

// A vector of samples along x.
template <typename Real>
struct Chunk {
    using Index = typename IndexOf<Real>::type;
    int64_t first, count;  // samples
    Reach reach;
    int64_t base, span;       // the first pixel, and how many from there on
    Vector<Index> near, far;  // the pixels, counted from `base`
    int64_t low[kLanes<Real>], high[kLanes<Real>];  // the pixels where Reach::any
    Vector<Real> low_weight, high_weight;
    Vector<Index> kept;  // all bits, or none for a sample that lies nowhere
};

template <typename Real>
inline void fill_regular(const Axis<Real>& axis, Chunk<Real>& chunk) {
    using Index = typename Chunk<Real>::Index;
    Vector<Index> low;
    axis.taps(chunk.first, low, chunk.high_weight);
    const Vector<Index> last = broadcast(static_cast<Index>(axis.last()));
    const Vector<Index> high = low < last ? low + 1 : low;
    chunk.base = low[0];  // samples come in order
    chunk.span = high[chunk.count - 1] - chunk.base + 1;
    chunk.near = low - static_cast<Index>(chunk.base);
    chunk.far = high - static_cast<Index>(chunk.base);
    chunk.low_weight = 1 - chunk.high_weight;
    chunk.kept = Vector<Index>{} == Vector<Index>{};
    chunk.reach = chunk.span <= 2 * kLanes<Real> ? Reach::window : Reach::near;
}

template <typename Real>
inline void fill_any(const Axis<Real>& axis, Chunk<Real>& chunk) {
    chunk.high_weight = Vector<Real>{}, chunk.kept = Vector<typename Chunk<Real>::Index>{};
    for (int64_t l = 0; l < kLanes<Real>; ++l) {
        chunk.low[l] = chunk.high[l] = 0;
        const Tap<Real> tap = axis.tap(chunk.first + l);
        if (l >= chunk.count || tap.low < 0) continue;
        chunk.low[l] = tap.low, chunk.high[l] = tap.high;
        chunk.high_weight[l] = tap.fraction;
        chunk.kept[l] = -1;
    }
    chunk.low_weight = 1 - chunk.high_weight;
    chunk.reach = Reach::any;
}

#ifdef __AVX512F__
inline __mmask16 first_of(Vector<float>, int64_t count) { return static_cast<__mmask16>(_bzhi_u32(0xffff, count)); }
inline __mmask8 first_of(Vector<double>, int64_t count) { return static_cast<__mmask8>(_bzhi_u32(0xff, count)); }
inline Vector<float> load_masked(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline Vector<double> load_masked(const double* from, __mmask8 mask) { return _mm512_maskz_loadu_pd(mask, from); }
inline void store_masked(float* to, Vector<float> value, __mmask16 mask) { _mm512_mask_storeu_ps(to, mask, value); }
inline void store_masked(double* to, Vector<double> value, __mmask8 mask) { _mm512_mask_storeu_pd(to, mask, value); }
#endif

// The next `count` elements, at most a vector; zeros beyond.
template <typename Real>
inline Vector<Real> load_some(const Real* from, int64_t stride, int64_t count) {
    Vector<Real> value = {};
    if (stride == 1) {
#ifdef __AVX512F__
        return load_masked(from, first_of(value, count));
#endif
        if (count == kLanes<Real>) return load(from);
    }
    for (int64_t l = 0; l < count; ++l) value[l] = from[l * stride];
    return value;
}

template <typename Real>
inline void store_some(Real* to, Vector<Real> value, int64_t count) {
#ifdef __AVX512F__
    return store_masked(to, value, first_of(value, count));
#endif
    if (count == kLanes<Real>) return store(to, value);
    for (int64_t l = 0; l < count; ++l) to[l] = value[l];
}

#ifdef __AVX512F__
inline Vector<float> permute(Vector<float> a, Vector<float> b, Vector<int32_t> index) {
    return _mm512_permutex2var_ps(a, reinterpret_cast<__m512i>(index), b);
}
inline Vector<double> permute(Vector<double> a, Vector<double> b, Vector<int64_t> index) {
    return _mm512_permutex2var_pd(a, reinterpret_cast<__m512i>(index), b);
}
inline Vector<float> look_up(const float* from, Vector<int32_t> index) {
    return _mm512_i32gather_ps(reinterpret_cast<__m512i>(index), from, 4);
}
inline Vector<double> look_up(const double* from, Vector<int64_t> index) {
    return _mm512_i64gather_pd(reinterpret_cast<__m512i>(index), from, 8);
}
#elif defined(__AVX2__)
inline Vector<float> look_up(const float* from, Vector<int32_t> index) {
    return _mm256_i32gather_ps(from, reinterpret_cast<__m256i>(index), 4);
}
inline Vector<double> look_up(const double* from, Vector<int64_t> index) {
    return _mm256_i64gather_pd(from, reinterpret_cast<__m256i>(index), 8);
}
#else
template <typename Real>
inline Vector<Real> look_up(const Real* from, Vector<typename IndexOf<Real>::type> index) {
    Vector<Real> value;
    for (int64_t l = 0; l < kLanes<Real>; ++l) value[l] = from[index[l]];
    return value;
}
inline Vector<float> look_up(const float* from, Vector<int32_t> index) { return look_up<float>(from, index); }
inline Vector<double> look_up(const double* from, Vector<int64_t> index) { return look_up<double>(from, index); }
#endif

// Reads rows of a plane at the samples of a chunk.
template <Reach kReach, typename Real>
class Reader {
   public:
    Reader(const Real* plane, const GatherStrides& stride, const Chunk<Real>& chunk)
        : from_(plane + (kReach == Reach::any ? 0 : chunk.base)),
          stride_y_(stride.y),
          stride_x_(stride.x),
          chunk_(chunk),
          near_(chunk.near),
          far_(chunk.far),
          low_weight_(chunk.low_weight),
          high_weight_(chunk.high_weight) {
#ifdef __AVX512F__
        mask_ = first_of(low_weight_, smaller(chunk.span, kLanes<Real>));
        further_ = first_of(low_weight_, larger<int64_t>(chunk.span - kLanes<Real>, 0));
#endif
    }

    Vector<Real> operator()(int64_t y) const {
        const Real* row = from_ + y * stride_y_;
        Vector<Real> low = {}, high = {};
        if constexpr (kReach == Reach::any) {
            for (int64_t l = 0; l < kLanes<Real>; ++l) {
                low[l] = row[chunk_.low[l] * stride_x_];
                high[l] = row[chunk_.high[l] * stride_x_];
            }
#ifdef __AVX512F__
        } else if constexpr (kReach == Reach::window) {
            const Vector<Real> a = load_masked(row, mask_), b = load_masked(row + kLanes<Real>, further_);
            low = permute(a, b, near_), high = permute(a, b, far_);
#endif
        } else {
            low = look_up(row, near_), high = look_up(row, far_);
        }
        return fma(high, high_weight_, low * low_weight_);
    }

   private:
    using Index = typename Chunk<Real>::Index;
    const Real* from_;
    int64_t stride_y_, stride_x_;
    const Chunk<Real>& chunk_;
    Vector<Index> near_, far_;
    Vector<Real> low_weight_, high_weight_;
#ifdef __AVX512F__
    decltype(first_of(Vector<Real>{}, 0)) mask_, further_;
#endif
};

// Samples of one channel: every row of `rows`, the columns of a chunk. Consecutive rows mostly share pixels.
template <Reach kReach, typename Real>
inline void resample(const Real* plane, const GatherStrides& stride, const Chunk<Real>& chunk, const Rows<Real>& rows,
                     Real* to, int64_t pitch) {
    const Reader<kReach, Real> read(plane, stride, chunk);
    const auto kept = chunk.kept;
    const int64_t columns = chunk.count;
    int64_t have_low = -1, have_high = -1;
    Vector<Real> low = {}, high = {};
    for (int64_t i = 0; i < rows.count; ++i, to += pitch) {
        const Tap<Real> row = rows[i];
        if (row.low < 0) {
            store_some(to, Vector<Real>{}, columns);
            continue;
        }
        if (row.low != have_low) low = row.low == have_high ? high : read(row.low);
        if (row.high != have_high) high = row.high == row.low ? low : read(row.high);
        have_low = row.low, have_high = row.high;
        Vector<Real> value = fma(high, broadcast(row.fraction), low * (1 - row.fraction));
        if constexpr (kReach == Reach::any) value = kept ? value : Vector<Real>{};
        store_some(to, value, columns);
    }
}

template <typename Real>
inline void resample_chunk(const Real* plane, const GatherStrides& stride, const Chunk<Real>& chunk,
                           const Rows<Real>& rows, Real* to, int64_t pitch) {
    switch (chunk.reach) {
        case Reach::window: return resample<Reach::window>(plane, stride, chunk, rows, to, pitch);
        case Reach::near: return resample<Reach::near>(plane, stride, chunk, rows, to, pitch);
        case Reach::any: return resample<Reach::any>(plane, stride, chunk, rows, to, pitch);
    }
}

// Where channels are contiguous: vectors of channels, transposed by way of the stack.
template <typename Real>
inline void resample_channels(const Real* image, const GatherStrides& stride, int64_t channels,
                              const Chunk<Real>* chunks, int64_t chunk_count, const Rows<Real>& rows, Real* to,
                              int64_t samples) {
    constexpr int64_t kChannels = 16;
    static_assert(kChannels % kLanes<Real> == 0, "");
    Real tile[kLanes<Real> * kChannels];
    for (int64_t c = 0; c < channels; c += kChannels) {
        const int64_t some = smaller(channels - c, kChannels);
        for (int64_t i = 0; i < rows.count; ++i) {
            const Tap<Real> row = rows[i];
            const Real* upper = image + c + larger<int64_t>(row.low, 0) * stride.y;
            const Real* lower = image + c + larger<int64_t>(row.high, 0) * stride.y;
            for (int64_t n = 0; n < chunk_count; ++n) {
                const Chunk<Real>& chunk = chunks[n];
                for (int64_t l = 0; l < chunk.count; ++l) {
                    Real* pixel = tile + l * kChannels;
                    if (row.low < 0 || !chunk.kept[l]) {
                        std::memset(pixel, 0, sizeof(Real) * kChannels);
                        continue;
                    }
                    const int64_t left = chunk.low[l] * stride.x, right = chunk.high[l] * stride.x;
                    const Real low = chunk.low_weight[l], high = chunk.high_weight[l];
                    for (int64_t v = 0; v < some; v += kLanes<Real>) {
                        const int64_t lanes = smaller(some - v, kLanes<Real>);
                        const auto between = [&](const Real* line) {
                            return fma(load_some(line + right + v, 1, lanes), broadcast(high),
                                       load_some(line + left + v, 1, lanes) * low);
                        };
                        store(pixel + v, fma(between(lower), broadcast(row.fraction),
                                             between(upper) * (1 - row.fraction)));
                    }
                }
                transpose(tile, kChannels, to + (c * samples + i) * samples + chunk.first, samples * samples,
                          chunk.count, some);
            }
        }
    }
}

// Which samples of a chunk lie beside each pixel of its window.
template <typename Real>
struct Inverse {
    using Index = typename Chunk<Real>::Index;
    static constexpr int64_t kRounds = 3;  // most samples beside a pixel, on either side

    // Sample number r beside each pixel of the two vectors of the window, of those that read the pixel as their first
    // or as their second; -1: no such sample.
    Vector<Index> near[kRounds][2], far[kRounds][2];
    int64_t rounds;  // 0: too many
};

#ifdef __AVX512F__
template <typename Real>
inline void fill_inverse(const Chunk<Real>& chunk, Inverse<Real>& inverse) {
    using Index = typename Chunk<Real>::Index;
    inverse.rounds = 0;
    if (chunk.reach != Reach::window) return;
    std::memset(inverse.near, -1, sizeof(inverse.near));
    std::memset(inverse.far, -1, sizeof(inverse.far));
    int64_t rounds = 1;
    const auto invert = [&](const Vector<Index>& pixels, Vector<Index>(&samples)[Inverse<Real>::kRounds][2]) {
        Index pixel[kLanes<Real>];
        store(pixel, pixels);
        int64_t round = 0;
        for (int64_t l = 0; l < chunk.count; ++l) {
            round = l > 0 && pixel[l] == pixel[l - 1] ? round + 1 : 0;
            if (round == Inverse<Real>::kRounds) return false;
            reinterpret_cast<Index*>(samples[round])[pixel[l]] = static_cast<Index>(l);
            rounds = larger(rounds, round + 1);
        }
        return true;
    };
    if (invert(chunk.near, inverse.near) && invert(chunk.far, inverse.far)) inverse.rounds = rounds;
}

// `spread`, if inverse.rounds > 0.
template <typename Real>
inline void spread_window(Vector<Real> value, const Chunk<Real>& chunk, const Inverse<Real>& inverse, Real* row) {
    const Vector<Real> low = value * chunk.low_weight, high = value * chunk.high_weight, zero = {};
    row += chunk.base;
    for (int64_t half = 0; half * kLanes<Real> < chunk.span; ++half, row += kLanes<Real>) {
        const auto mask = first_of(zero, smaller(chunk.span - half * kLanes<Real>, kLanes<Real>));
        Vector<Real> sum = load_masked(row, mask);
        for (int64_t round = 0; round < inverse.rounds; ++round) {
            sum += permute(low, zero, inverse.near[round][half]);  // -1 names the last zero
            sum += permute(high, zero, inverse.far[round][half]);
        }
        store_masked(row, sum, mask);
    }
}
#else
template <typename Real>
inline void fill_inverse(const Chunk<Real>&, Inverse<Real>& inverse) {
    inverse.rounds = 0;
}
#endif

// Adds a row of gradients at the samples of a chunk to the pixels that they were read from.
template <typename Real>
inline void spread(Vector<Real> value, const Chunk<Real>& chunk, const Inverse<Real>& inverse, Real* row) {
#ifdef __AVX512F__
    if (inverse.rounds > 0) return spread_window(value, chunk, inverse, row);
#else
    (void)inverse;
#endif
    Real low[kLanes<Real>], high[kLanes<Real>];
    store(low, value * chunk.low_weight);
    store(high, value * chunk.high_weight);
    if (chunk.reach == Reach::any) {
        for (int64_t l = 0; l < chunk.count; ++l) {
            row[chunk.low[l]] += low[l];
            row[chunk.high[l]] += high[l];
        }
        return;
    }
    typename Chunk<Real>::Index near[kLanes<Real>], far[kLanes<Real>];
    store(near, chunk.near);
    store(far, chunk.far);
    row += chunk.base;
    for (int64_t l = 0; l < chunk.count; ++l) {
        row[near[l]] += low[l];
        row[far[l]] += high[l];
    }
}

// The adjoint of `resample`, for image rows from `top` to `bottom` (exclusive).
template <typename Real>
inline void resample_backward(const Real* from, const GatherStrides& stride, const Chunk<Real>& chunk,
                              const Inverse<Real>& inverse, const Rows<Real>& rows, Real* plane, int64_t width,
                              int64_t top, int64_t bottom) {
    int64_t have_low = -1, have_high = -1;
    Vector<Real> low = {}, high = {};
    const auto add = [&](Vector<Real> value, int64_t y) {
        if (y >= top && y < bottom) spread(value, chunk, inverse, plane + y * width);
    };
    for (int64_t i = 0; i < rows.count; ++i) {
        const Tap<Real> row = rows[i];
        if (row.low < 0 || row.high < top || row.low >= bottom) continue;
        if (row.low != have_low || row.high != have_high) {
            add(low, have_low);
            if (row.low == have_high) {
                low = high;
            } else {
                add(high, have_high);
                low = Vector<Real>{};
            }
            high = Vector<Real>{};
            have_low = row.low, have_high = row.high;
        }
        Vector<Real> value = load_some(from + i * stride.y + chunk.first * stride.x, stride.x, chunk.count);
        value = chunk.kept ? value : Vector<Real>{};
        low = fma(value, broadcast(1 - row.fraction), low);
        high = fma(value, broadcast(row.fraction), high);
    }
    add(low, have_low);
    add(high, have_high);
}

// Calls body(chunks, how many, rows) for parts of a patch of at most kSide samples a side.
template <typename Real, typename Body>
inline void for_parts(const Axis<Real>& y, const Axis<Real>& x, int64_t samples, int64_t stride, const Body& body) {
    Chunk<Real> chunks[kSide / kLanes<Real>];
    Rows<Real> rows;
    for (int64_t column = 0; column < samples; column += kSide) {
        const int64_t right = smaller(column + kSide, samples);
        int64_t chunk_count = 0;
        for (int64_t first = column; first < right; first += kLanes<Real>) {
            Chunk<Real>& chunk = chunks[chunk_count++];
            chunk.first = first, chunk.count = smaller(kLanes<Real>, right - first);
            if (stride == 1 && x.regular()) {
                fill_regular(x, chunk);
            } else {
                fill_any(x, chunk);
            }
        }
        for (rows.first = 0; rows.first < samples; rows.first += kSide) {
            rows.count = smaller(kSide, samples - rows.first);
            fill_rows(y, rows);
            body(chunks, chunk_count, rows);
        }
    }
}

// Whether a patch inside the image reads no row from `top` to `bottom` (exclusive); false where it is close.
template <typename Real>
inline bool misses(double corner, double extent, Real height, int64_t top, int64_t bottom) {
    constexpr double kEpsilon = sizeof(Real) == sizeof(float) ? 0x1p-23 : 0x1p-52;
    const double margin = 2 + 16 * kEpsilon * (extent + static_cast<double>(height));  // positions are rounded
    return corner + extent + margin < static_cast<double>(top) || corner - margin > static_cast<double>(bottom);
}

// Resampling costs about as much as this many times the traffic.
constexpr int64_t kWork = 4;

}  // namespace

template <typename Real>
void gather_bilinear(const Real* source, const GatherCoords& coords, Real* patches, const GatherSizes& s,
                     const GatherStrides& stride, const GatherGrid& grid) {
    const int64_t plane = s.patch * s.patch;
    const int64_t bytes = smaller(s.patches_bytes, INT64_MAX / kWork) * kWork;
    for_blocks(s, sizeof(Real), bytes, [&](int64_t image, int64_t k, int64_t last_k, int64_t c, int64_t last_c) {
        const Real* from = source + offset(image, s, stride) + c * stride.channel;
        for (; k < last_k; ++k) {
            const int64_t n = image * s.count + k;
            Real* to = patches + (n * s.channels + c) * plane;
            const Axis<Real> y(real(coords, 2 * n), grid.extent_y, s.patch, grid.edge_to_edge, s.height);
            const Axis<Real> x(real(coords, 2 * n + 1), grid.extent_x, s.patch, grid.edge_to_edge, s.width);
            if (!y.inside() || !x.inside() || s.height == 0 || s.width == 0) {
                std::memset(to, 0, (last_c - c) * plane * sizeof(Real));
                continue;
            }
            for_parts(y, x, s.patch, stride.x, [&](const Chunk<Real>* chunks, int64_t chunk_count,
                                                   const Rows<Real>& rows) {
                Real* part = to + rows.first * s.patch;
                if (stride.channel == 1 && stride.x != 1) {
                    resample_channels(from, stride, last_c - c, chunks, chunk_count, rows, part, s.patch);
                    return;
                }
                for (int64_t i = 0; i < last_c - c; ++i) {
                    for (int64_t j = 0; j < chunk_count; ++j) {
                        resample_chunk(from + i * stride.channel, stride, chunks[j], rows,
                                       part + i * plane + chunks[j].first, s.patch);
                    }
                }
            });
        }
    });
}

template <typename Real>
void gather_bilinear_backward(const Real* patches, const GatherCoords& coords, Real* images, const GatherSizes& s,
                              const GatherStrides& stride, const GatherGrid& grid) {
    const int64_t bytes = smaller(s.images_bytes + s.patches_bytes, INT64_MAX / kWork) * kWork;
    for_bands(s, bytes, [&](int64_t image, int64_t top, int64_t bottom, int64_t first_c, int64_t last_c) {
        const Real* from = patches + offset(image, s, stride);
        Real* to = images + image * s.channels * s.height * s.width;
        for (int64_t c = first_c; c < last_c; ++c) {
            std::memset(to + (c * s.height + top) * s.width, 0, (bottom - top) * s.width * sizeof(Real));
        }
        for (int64_t k = 0; k < s.count; ++k) {
            const int64_t n = image * s.count + k;
            const Axis<Real> y(real(coords, 2 * n), grid.extent_y, s.patch, grid.edge_to_edge, s.height);
            const Axis<Real> x(real(coords, 2 * n + 1), grid.extent_x, s.patch, grid.edge_to_edge, s.width);
            if (!y.inside() || !x.inside()) continue;
            if (misses(real(coords, 2 * n), grid.extent_y, static_cast<Real>(s.height), top, bottom)) continue;
            for_parts(y, x, s.patch, 1, [&](const Chunk<Real>* chunks, int64_t chunk_count, const Rows<Real>& rows) {
                Inverse<Real> inverses[kSide / kLanes<Real>];
                for (int64_t j = 0; j < chunk_count; ++j) fill_inverse(chunks[j], inverses[j]);
                for (int64_t c = first_c; c < last_c; ++c) {
                    const Real* part = from + k * stride.count + c * stride.channel + rows.first * stride.y;
                    for (int64_t j = 0; j < chunk_count; ++j) {
                        resample_backward(part, stride, chunks[j], inverses[j], rows, to + c * s.height * s.width,
                                          s.width, top, bottom);
                    }
                }
            });
        }
    });
}

#define ICSEG_GATHER_BILINEAR(Real)                                                                              \
    template void gather_bilinear<Real>(const Real*, const GatherCoords&, Real*, const GatherSizes&,             \
                                        const GatherStrides&, const GatherGrid&);                                \
    template void gather_bilinear_backward<Real>(const Real*, const GatherCoords&, Real*, const GatherSizes&,    \
                                                 const GatherStrides&, const GatherGrid&);
ICSEG_GATHER_BILINEAR(float)
ICSEG_GATHER_BILINEAR(double)

}  // namespace ICSEG_ISA
}  // namespace icseg
