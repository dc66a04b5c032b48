// icseg_gather_patches and its adjoint, pixel by pixel.
#include "testing.h"

#include <algorithm>

namespace {

using namespace testing;

struct Sizes {
    int64_t outer, inner, channels, height, width, count, patch;

    Sizes(Random& random, bool large)
        : outer(random.size(3)),
          inner(random.size(3)),
          channels(random.size(random.chance(20) ? 40 : 4)),
          height(random.size(150)),
          width(random.size(40)),
          count(random.size(9)),
          patch(random.integer(1, 20)) {
        if (large) *this = {2, 1, 3, 200, 120, 40, 24};
    }
    Sizes(int64_t o, int64_t i, int64_t c, int64_t h, int64_t w, int64_t k, int64_t p)
        : outer(o), inner(i), channels(c), height(h), width(w), count(k), patch(p) {}

    int64_t images() const { return outer * inner * channels * height * width; }
    int64_t patches() const { return outer * inner * count * channels * patch * patch; }
    int64_t pixel(int64_t o, int64_t b, int64_t c, int64_t y, int64_t x) const {
        return place({o, b, c, y, x}, {outer, inner, channels, height, width});
    }
    int64_t sample(int64_t o, int64_t b, int64_t k, int64_t c, int64_t i, int64_t j) const {
        return place({o, b, k, c, i, j}, {outer, inner, count, channels, patch, patch});
    }
    Coords coords(Random& random, icseg_coords most) const {
        return Coords(random, outer * inner * count, height, width, patch + 1, most);
    }

    // visit(o, b, k, c, i, j, number of the patch) for every element of every patch, patches in order.
    template <typename Visit>
    void each(const Visit& visit) const {
        for (int64_t o = 0; o < outer; ++o)
            for (int64_t b = 0; b < inner; ++b)
                for (int64_t k = 0; k < count; ++k)
                    for (int64_t c = 0; c < channels; ++c)
                        for (int64_t i = 0; i < patch; ++i)
                            for (int64_t j = 0; j < patch; ++j) visit(o, b, k, c, i, j, (o * inner + b) * count + k);
    }
};

// visit(o, b, k, c, i, j, y, x) for every element of a patch that lies inside its image.
template <typename Visit>
void each_copied(const Sizes& s, const Coords& coords, const Visit& visit) {
    s.each([&](auto o, auto b, auto k, auto c, auto i, auto j, auto n) {
        const __int128 y = __int128(coords.whole(2 * n)) + i, x = __int128(coords.whole(2 * n + 1)) + j;
        if (y >= 0 && y < s.height && x >= 0 && x < s.width)
            visit(o, b, k, c, i, j, static_cast<int64_t>(y), static_cast<int64_t>(x));
    });
}

template <typename Element>
class Gather : public Case {
public:
    Gather(Random& random, bool large)
        : s_(random, large),
          source_(random, {s_.outer, s_.inner, s_.channels, s_.height, s_.width}),
          coords_(s_.coords(random, ICSEG_COORDS_INT64)),
          expected_(s_.patches(), 0) {
        for (int64_t n = 0; n < source_.storage().count(); ++n)
            source_.storage()[n] = static_cast<Element>(random.bits());
        each_copied(s_, coords_, [&](auto o, auto b, auto k, auto c, auto i, auto j, auto y, auto x) {
            expected_[s_.sample(o, b, k, c, i, j)] = source_.at({o, b, c, y, x});
        });
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<Element> patches = output<Element>(random, s_.patches());
        const auto& t = source_.strides;
        EXPECT_CODE(ICSEG_OK, icseg_gather_patches(source_.data(), coords_.data(), patches.data(), s_.outer, s_.inner,
                                                   s_.channels, s_.height, s_.width, s_.count, s_.patch, t[0], t[1],
                                                   t[2], t[3], t[4], sizeof(Element), coords_.type()));
        expect_equal("patches", patches, expected_);
        Digest digest;
        digest.add(patches);
        return digest.value();
    }

private:
    Sizes s_;
    Strided<Element> source_;
    Coords coords_;
    std::vector<Element> expected_;
};

int backward(const float* patches, const void* coords, float* images, const Sizes& s, const std::vector<int64_t>& t,
             int type) {
    return icseg_gather_patches_backward_f32(patches, coords, images, s.outer, s.inner, s.count, s.channels, s.patch,
                                             s.height, s.width, t[0], t[1], t[2], t[3], t[4], t[5], type);
}

int backward(const double* patches, const void* coords, double* images, const Sizes& s, const std::vector<int64_t>& t,
             int type) {
    return icseg_gather_patches_backward_f64(patches, coords, images, s.outer, s.inner, s.count, s.channels, s.patch,
                                             s.height, s.width, t[0], t[1], t[2], t[3], t[4], t[5], type);
}

template <typename Real>
class Backward : public Case {
public:
    Backward(Random& random, bool large)
        : s_(random, large),
          patches_(random, {s_.outer, s_.inner, s_.count, s_.channels, s_.patch, s_.patch}),
          coords_(s_.coords(random, ICSEG_COORDS_INT64)),
          expected_(s_.images(), 0) {
        patches_.fill(random, false);
        each_copied(s_, coords_, [&](auto o, auto b, auto k, auto c, auto i, auto j, auto y, auto x) {
            expected_[s_.pixel(o, b, c, y, x)] += patches_.at({o, b, k, c, i, j});
        });
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<Real> images = output<Real>(random, s_.images());
        EXPECT_CODE(ICSEG_OK,
                    backward(patches_.data(), coords_.data(), images.data(), s_, patches_.strides, coords_.type()));
        expect_equal("images", images, expected_);
        Digest digest;
        digest.add(images);
        return digest.value();
    }

private:
    Sizes s_;
    Strided<Real> patches_;
    Coords coords_;
    std::vector<Real> expected_;
};

// How patches are resampled.
struct Grid {
    double extent_y, extent_x;
    int edge_to_edge;

    explicit Grid(Random& random)
        : extent_y(extent(random)), extent_x(random.chance(50) ? extent_y : extent(random)), edge_to_edge(random.chance(50)) {}

    // Of larger ones it depends on the order of operations where a sample lies.
    bool plain() const { return extent_y < 1e4 && extent_x < 1e4; }

    static double extent(Random& random) {
        if (random.chance(10)) return random.pick({1e-3, 1e3, 1e30});
        return random.chance(50) ? static_cast<double>(random.integer(1, 20)) : 0.1 + 20 * random.uniform();
    }
};

struct Tap {
    bool inside;
    int64_t low, high;
    double weight;  // of high
};

Tap tap_along(double corner, double extent, int64_t i, int64_t samples, int edge_to_edge, int64_t length) {
    if (!(corner > -extent && corner < static_cast<double>(length)) || std::isinf(corner)) return {false, 0, 0, 0};
    const double steps = samples > 1 ? samples - 1 : 1;
    const double position = edge_to_edge ? corner + extent / 2 - 0.5 + extent * (i / steps - 0.5)
                                         : corner + (i + 0.5) * extent / samples - 0.5;
    const double within = std::fmin(std::fmax(position, 0), static_cast<double>(length - 1));
    const int64_t low = static_cast<int64_t>(within);
    return {true, low, low + 1 < length ? low + 1 : low, within - static_cast<double>(low)};
}

// visit(o, b, k, c, i, j, y, x) for every sample of a patch that overlaps its image.
template <typename Visit>
void each_resampled(const Sizes& s, const Coords& coords, const Grid& grid, const Visit& visit) {
    s.each([&](auto o, auto b, auto k, auto c, auto i, auto j, auto n) {
        if (s.height == 0 || s.width == 0) return;
        const Tap y = tap_along(coords.real(2 * n), grid.extent_y, i, s.patch, grid.edge_to_edge, s.height);
        const Tap x = tap_along(coords.real(2 * n + 1), grid.extent_x, j, s.patch, grid.edge_to_edge, s.width);
        if (y.inside && x.inside) visit(o, b, k, c, i, j, y, x);
    });
}

// The relative error of a position, of some hundreds of pixels, in Real.
template <typename Real>
constexpr double kPositionError = sizeof(Real) == 4 ? 1e-4 : 1e-12;

int bilinear(const float* source, const void* coords, float* patches, const Sizes& s, const std::vector<int64_t>& t,
             int type, const Grid& grid) {
    return icseg_gather_patches_bilinear_f32(source, coords, patches, s.outer, s.inner, s.channels, s.height, s.width,
                                             s.count, s.patch, t[0], t[1], t[2], t[3], t[4], type, grid.extent_y,
                                             grid.extent_x, grid.edge_to_edge);
}

int bilinear(const double* source, const void* coords, double* patches, const Sizes& s, const std::vector<int64_t>& t,
             int type, const Grid& grid) {
    return icseg_gather_patches_bilinear_f64(source, coords, patches, s.outer, s.inner, s.channels, s.height, s.width,
                                             s.count, s.patch, t[0], t[1], t[2], t[3], t[4], type, grid.extent_y,
                                             grid.extent_x, grid.edge_to_edge);
}

int bilinear_backward(const float* patches, const void* coords, float* images, const Sizes& s,
                      const std::vector<int64_t>& t, int type, const Grid& grid) {
    return icseg_gather_patches_bilinear_backward_f32(
        patches, coords, images, s.outer, s.inner, s.count, s.channels, s.patch, s.height, s.width, t[0], t[1], t[2],
        t[3], t[4], t[5], type, grid.extent_y, grid.extent_x, grid.edge_to_edge);
}

int bilinear_backward(const double* patches, const void* coords, double* images, const Sizes& s,
                      const std::vector<int64_t>& t, int type, const Grid& grid) {
    return icseg_gather_patches_bilinear_backward_f64(
        patches, coords, images, s.outer, s.inner, s.count, s.channels, s.patch, s.height, s.width, t[0], t[1], t[2],
        t[3], t[4], t[5], type, grid.extent_y, grid.extent_x, grid.edge_to_edge);
}

template <typename Real>
class Bilinear : public Case {
public:
    Bilinear(Random& random, bool large)
        : s_(random, large),
          source_(random, {s_.outer, s_.inner, s_.channels, s_.height, s_.width}),
          coords_(s_.coords(random, ICSEG_COORDS_FLOAT64)),
          grid_(random),
          hostile_(random.chance(20)),
          expected_(s_.patches(), 0) {
        source_.fill(random, hostile_);
        each_resampled(s_, coords_, grid_, [&](auto o, auto b, auto k, auto c, auto i, auto j, Tap y, Tap x) {
            const double upper = (1 - x.weight) * source_.at({o, b, c, y.low, x.low}) +
                                 x.weight * source_.at({o, b, c, y.low, x.high});
            const double lower = (1 - x.weight) * source_.at({o, b, c, y.high, x.low}) +
                                 x.weight * source_.at({o, b, c, y.high, x.high});
            expected_[s_.sample(o, b, k, c, i, j)] = (1 - y.weight) * upper + y.weight * lower;
        });
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<Real> patches = output<Real>(random, s_.patches());
        EXPECT_CODE(ICSEG_OK, bilinear(source_.data(), coords_.data(), patches.data(), s_, source_.strides,
                                       coords_.type(), grid_));
        // Of NaN and infinity a weight of almost 0 may make either: only that the bits are the same each time.
        if (!hostile_ && grid_.plain()) expect_close("patches", patches, expected_, {16 * kPositionError<Real>});
        Digest digest;
        digest.add(patches);
        return digest.value();
    }

private:
    Sizes s_;
    Strided<Real> source_;
    Coords coords_;
    Grid grid_;
    bool hostile_;
    std::vector<double> expected_;
};

template <typename Real>
class BilinearBackward : public Case {
public:
    BilinearBackward(Random& random, bool large)
        : s_(random, large),
          patches_(random, {s_.outer, s_.inner, s_.count, s_.channels, s_.patch, s_.patch}),
          coords_(s_.coords(random, ICSEG_COORDS_FLOAT64)),
          grid_(random),
          expected_(s_.images(), 0),
          bounds_(s_.images(), 1e-30) {
        patches_.fill(random, false);
        each_resampled(s_, coords_, grid_, [&](auto o, auto b, auto k, auto c, auto i, auto j, Tap y, Tap x) {
            const double value = patches_.at({o, b, k, c, i, j});
            expected_[s_.pixel(o, b, c, y.low, x.low)] += (1 - y.weight) * (1 - x.weight) * value;
            expected_[s_.pixel(o, b, c, y.low, x.high)] += (1 - y.weight) * x.weight * value;
            expected_[s_.pixel(o, b, c, y.high, x.low)] += y.weight * (1 - x.weight) * value;
            expected_[s_.pixel(o, b, c, y.high, x.high)] += y.weight * x.weight * value;
            // A position rounded otherwise may fall on the next pixel.
            for (int64_t row = std::max<int64_t>(y.low - 1, 0); row < std::min(y.low + 3, s_.height); ++row)
                for (int64_t col = std::max<int64_t>(x.low - 1, 0); col < std::min(x.low + 3, s_.width); ++col)
                    bounds_[s_.pixel(o, b, c, row, col)] += 4 * kPositionError<Real> * std::fabs(value);
        });
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<Real> images = output<Real>(random, s_.images());
        EXPECT_CODE(ICSEG_OK, bilinear_backward(patches_.data(), coords_.data(), images.data(), s_, patches_.strides,
                                                coords_.type(), grid_));
        if (grid_.plain()) expect_close("images", images, expected_, bounds_);
        Digest digest;
        digest.add(images);
        return digest.value();
    }

private:
    Sizes s_;
    Strided<Real> patches_;
    Coords coords_;
    Grid grid_;
    std::vector<double> expected_, bounds_;
};

void errors() {
    const int64_t huge = int64_t(1) << 62;
    struct Row {
        int code;
        Sizes sizes;
        int64_t element_bytes = 4;
    };
    const Row rows[] = {
        {ICSEG_NEGATIVE_SIZE, {-1, 1, 1, 4, 4, 1, 2}},
        {ICSEG_NEGATIVE_SIZE, {1, INT64_MIN, 1, 4, 4, 1, 2}},
        {ICSEG_NEGATIVE_SIZE, {1, 1, -1, 4, 4, 1, 2}},
        {ICSEG_NEGATIVE_SIZE, {1, 1, 1, -4, 4, 1, 2}},
        {ICSEG_NEGATIVE_SIZE, {1, 1, 1, 4, -4, 1, 2}},
        {ICSEG_NEGATIVE_SIZE, {1, 1, 1, 4, 4, -1, 2}},
        {ICSEG_PATCH_SIZE, {1, 1, 1, 4, 4, 1, 0}},
        {ICSEG_PATCH_SIZE, {1, 1, 1, 4, 4, 1, INT64_MIN}},
        {ICSEG_ELEMENT_BYTES, {1, 1, 1, 4, 4, 1, 2}, 3},
        {ICSEG_ELEMENT_BYTES, {1, 1, 1, 4, 4, 1, 2}, 0},
        {ICSEG_ELEMENT_BYTES, {1, 1, 1, 4, 4, 1, 2}, 16},
        {ICSEG_TOO_LARGE, {1, 1, 1, huge, huge, 1, 2}},
        {ICSEG_TOO_LARGE, {1, 1, huge, 4, 4, 1, 2}},
        {ICSEG_TOO_LARGE, {int64_t(1) << 32, int64_t(1) << 31, 1, 1, 1, 1, 1}},
        {ICSEG_TOO_LARGE, {1, 1, 1, 4, 4, 1, huge}},
        {ICSEG_TOO_LARGE, {1, 1, 1, 4, 4, huge, 2}},
        {ICSEG_TOO_LARGE, {1, 1, 0, 4, 4, huge, 2}},
        {ICSEG_TOO_LARGE, {1, 1, 1, huge, 0, 1, huge}},
        {ICSEG_TOO_LARGE, {1, 1, 0, huge, 0, 1, huge}},
        {ICSEG_OK, {huge, huge, 0, 4, 4, 0, 2}},  // nothing to do
        {ICSEG_OK, {1, 1, 1, huge, 0, 0, 2}},
    };
    const std::vector<int64_t> strides(6, 0);
    const float* const f32 = nullptr;
    const double* const f64 = nullptr;
    Random random(0);
    const Grid grid(random);
    for (const Row& row : rows) {
        const Sizes& s = row.sizes;
        EXPECT_CODE(row.code,
                    icseg_gather_patches(nullptr, nullptr, nullptr, s.outer, s.inner, s.channels, s.height, s.width,
                                         s.count, s.patch, 0, 0, 0, 0, 0, row.element_bytes, ICSEG_COORDS_INT64));
        if (row.code == ICSEG_ELEMENT_BYTES) continue;
        EXPECT_CODE(row.code, backward(f32, nullptr, nullptr, s, strides, ICSEG_COORDS_INT32));
        EXPECT_CODE(row.code, backward(f64, nullptr, nullptr, s, strides, ICSEG_COORDS_INT64));
        EXPECT_CODE(row.code, bilinear(f32, nullptr, nullptr, s, strides, ICSEG_COORDS_FLOAT32, grid));
        EXPECT_CODE(row.code, bilinear(f64, nullptr, nullptr, s, strides, ICSEG_COORDS_FLOAT64, grid));
        EXPECT_CODE(row.code, bilinear_backward(f32, nullptr, nullptr, s, strides, ICSEG_COORDS_INT32, grid));
        EXPECT_CODE(row.code, bilinear_backward(f64, nullptr, nullptr, s, strides, ICSEG_COORDS_FLOAT64, grid));
    }
    const Sizes fine(1, 1, 1, 4, 4, 1, 2);
    for (const int type : {-1, 2, 3, 4, INT32_MAX}) {
        EXPECT_CODE(ICSEG_COORDS_TYPE, icseg_gather_patches(nullptr, nullptr, nullptr, 1, 1, 1, 4, 4, 1, 2, 0, 0, 0, 0, 0,
                                                            4, type));
        EXPECT_CODE(ICSEG_COORDS_TYPE, backward(f32, nullptr, nullptr, fine, strides, type));
        if (type == 2 || type == 3) continue;
        EXPECT_CODE(ICSEG_COORDS_TYPE, bilinear(f32, nullptr, nullptr, fine, strides, type, grid));
        EXPECT_CODE(ICSEG_COORDS_TYPE, bilinear_backward(f64, nullptr, nullptr, fine, strides, type, grid));
    }
}

std::unique_ptr<Case> make(Random& random, bool large) {
    switch (random.integer(0, 9)) {
        case 0: return std::make_unique<Gather<uint8_t>>(random, large);
        case 1: return std::make_unique<Gather<uint16_t>>(random, large);
        case 2: return std::make_unique<Gather<uint32_t>>(random, large);
        case 3: return std::make_unique<Gather<uint64_t>>(random, large);
        case 4: return std::make_unique<Backward<float>>(random, large);
        case 5: return std::make_unique<Backward<double>>(random, large);
        case 6: return std::make_unique<Bilinear<float>>(random, large);
        case 7: return std::make_unique<Bilinear<double>>(random, large);
        case 8: return std::make_unique<BilinearBackward<float>>(random, large);
        default: return std::make_unique<BilinearBackward<double>>(random, large);
    }
}

const Test test("gather_patches", make, errors);

}  // namespace
