// icseg_scatter_patches and its adjoint, patch by patch.
#include "testing.h"

namespace {

using namespace testing;

struct Bfloat16 {};

// What a kind of elements is stored in, and summed in.
template <typename Kind>
struct Types {
    using Stored = Kind;
    using Sum = Kind;
    static double wide(Stored value) { return value; }
    static Stored narrow(double value) { return static_cast<Stored>(value); }
    static constexpr double kRounding = sizeof(Kind) == 4 ? 1e-5 : 1e-13;
};
template <>
struct Types<Bfloat16> {
    using Stored = uint16_t;
    using Sum = float;
    static double wide(Stored value) { return from_bfloat16(value); }
    static Stored narrow(double value) { return to_bfloat16(static_cast<float>(value)); }
    static constexpr double kRounding = 0x1p-8;
};

struct Sizes {
    int64_t batch, count, channels, patch, height, width;

    Sizes(Random& random, bool large)
        : batch(random.size(3)),
          count(random.size(random.chance(10) ? 90 : 9)),
          channels(random.size(4)),
          patch(random.integer(1, 20)),
          height(random.size(100)),
          width(random.size(100)) {
        if (large) *this = {2, 40, 3, 24, 200, 120};
    }
    Sizes(int64_t b, int64_t k, int64_t c, int64_t p, int64_t h, int64_t w)
        : batch(b), count(k), channels(c), patch(p), height(h), width(w) {}

    int64_t totals() const { return batch * height * width; }
    int64_t images() const { return totals() * channels; }
    int64_t patches() const { return batch * count * channels * patch * patch; }
};

template <typename Kind>
struct Inputs {
    using Sum = typename Types<Kind>::Sum;

    Inputs(Random& random, bool large)
        : s(random, large),
          coords(random, s.batch * s.count, s.height, s.width, s.patch + 1, ICSEG_COORDS_INT64),
          weight(random, random.chance(40) ? 0 : s.patch * s.patch) {
        for (int64_t i = 0; i < weight.count(); ++i)
            weight[i] = static_cast<Sum>(random.chance(10) ? random.pick<double>({0, -1, NAN, -INFINITY})
                                                           : 0.01 + random.uniform());
    }

    const Sum* weights() const { return weight.count() ? weight.data() : nullptr; }
    // Whether an element of a patch covers a pixel, and with what weight.
    template <typename Visit>
    void each(const Visit& visit) const {
        for (int64_t b = 0; b < s.batch; ++b)
            for (int64_t k = 0; k < s.count; ++k)
                for (int64_t i = 0; i < s.patch; ++i)
                    for (int64_t j = 0; j < s.patch; ++j) {
                        const int64_t corner = 2 * (b * s.count + k);
                        const __int128 y = __int128(coords.whole(corner)) + i, x = __int128(coords.whole(corner + 1)) + j;
                        const Sum w = weight.count() ? weight[i * s.patch + j] : Sum(1);
                        if (y >= 0 && y < s.height && x >= 0 && x < s.width && w > 0)
                            visit(b, k, i, j, static_cast<int64_t>(y), static_cast<int64_t>(x), w);
                    }
    }
    // The sum of weights at each pixel.
    std::vector<double> totals() const {
        std::vector<double> total(s.totals(), 0);
        each([&](auto b, auto, auto, auto, auto y, auto x, Sum w) {
            total[place({b, y, x}, {s.batch, s.height, s.width})] += w;
        });
        return total;
    }

    Sizes s;
    Coords coords;
    Array<Sum> weight;
};

#define SCATTER(suffix, Kind)                                                                                          \
    int scatter(Kind, const Types<Kind>::Stored* patches, const void* coords, const Types<Kind>::Sum* weight,          \
                Types<Kind>::Stored* mean, Types<Kind>::Sum* total, uint8_t* coverage, double fill, const Sizes& s,    \
                const std::vector<int64_t>& t, bool narrow) {                                                          \
        return icseg_scatter_patches_##suffix(patches, coords, weight, mean, total, coverage, fill, s.batch, s.count,  \
                                              s.channels, s.patch, s.height, s.width, t[0], t[1], t[2], t[3], t[4],    \
                                              narrow);                                                                 \
    }                                                                                                                  \
    int backward(Kind, const Types<Kind>::Stored* grad, const Types<Kind>::Sum* total, const void* coords,             \
                 const Types<Kind>::Sum* weight, Types<Kind>::Stored* patches, const Sizes& s,                         \
                 const std::vector<int64_t>& t, bool narrow) {                                                         \
        return icseg_scatter_patches_backward_##suffix(grad, total, coords, weight, patches, s.batch, s.count,         \
                                                       s.channels, s.patch, s.height, s.width, t[0], t[1], t[2], t[3], \
                                                       narrow);                                                        \
    }
SCATTER(f32, float)
SCATTER(f64, double)
SCATTER(bf16, Bfloat16)

template <typename Kind>
void fill_with(Random& random, Strided<typename Types<Kind>::Stored>& tensor, bool hostile) {
    for (int64_t i = 0; i < tensor.storage().count(); ++i) tensor.storage()[i] = Types<Kind>::narrow(NAN);
    tensor.each([&](auto& element) { element = Types<Kind>::narrow(hostile ? random.value() : random.normal()); });
}

template <typename Kind>
std::vector<double> widened(const Array<typename Types<Kind>::Stored>& array) {
    std::vector<double> values;
    for (int64_t i = 0; i < array.count(); ++i) values.push_back(Types<Kind>::wide(array[i]));
    return values;
}

template <typename Kind>
void expect_near(const char* what, Random& random, const Array<typename Types<Kind>::Stored>& found,
                 const std::vector<double>& expected, const std::vector<double>& bounds) {
    const std::vector<double> values = widened<Kind>(found);
    const Array<double> wide(random, found.count());
    for (int64_t i = 0; i < found.count(); ++i) wide[i] = values[i];
    expect_close(what, wide, expected, bounds);
}

template <typename Kind>
class Scatter : public Case {
public:
    using Stored = typename Types<Kind>::Stored;
    using Sum = typename Types<Kind>::Sum;

    Scatter(Random& random, bool large)
        : in_(random, large),
          patches_(random, {s_.batch, s_.count, s_.channels, s_.patch, s_.patch}),
          fill_(random.pick({-10.0, 0.0, 0.1, 3e38})),
          totals_(in_.totals()),
          expected_(s_.images(), 0),
          bounds_(s_.images(), 0) {
        fill_with<Kind>(random, patches_, random.chance(30));
        in_.each([&](auto b, auto k, auto i, auto j, auto y, auto x, Sum w) {
            for (int64_t c = 0; c < s_.channels; ++c) {
                const double product = w * Types<Kind>::wide(patches_.at({b, k, c, i, j}));
                expected_[pixel(b, c, y, x)] += product;
                bounds_[pixel(b, c, y, x)] += std::fabs(product);
            }
        });
        for (int64_t b = 0; b < s_.batch; ++b)
            for (int64_t c = 0; c < s_.channels; ++c)
                for (int64_t y = 0; y < s_.height; ++y)
                    for (int64_t x = 0; x < s_.width; ++x) {
                        const double total = totals_[place({b, y, x}, {s_.batch, s_.height, s_.width})];
                        double& mean = expected_[pixel(b, c, y, x)];
                        double& bound = bounds_[pixel(b, c, y, x)];
                        mean = total > 0 ? mean / total : Types<Kind>::wide(Types<Kind>::narrow(fill_));
                        bound = Types<Kind>::kRounding * (total > 0 ? bound / total : 0) + 1e-37;
                    }
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<Stored> mean = output<Stored>(random, s_.images());
        const Array<Sum> total = output<Sum>(random, s_.totals());
        const Array<uint8_t> coverage = output<uint8_t>(random, s_.totals());
        const bool wanted = seed % 3;
        EXPECT_CODE(ICSEG_OK, scatter(Kind(), patches_.data(), in_.coords.data(), in_.weights(), mean.data(),
                                      wanted ? total.data() : nullptr, coverage.data(), fill_, s_, patches_.strides,
                                      in_.coords.type() == ICSEG_COORDS_INT32));
        expect_near<Kind>("mean", random, mean, expected_, bounds_);
        for (int64_t i = 0; i < s_.totals(); ++i) {
            if (coverage[i] != (totals_[i] > 0)) fail("coverage[%lld] is %d", (long long)i, coverage[i]);
            if (wanted && !(std::fabs(total[i] - totals_[i]) <= 1e-5 * totals_[i]))
                fail("total[%lld] is %g, expected %g", (long long)i, (double)total[i], totals_[i]);
        }
        Digest digest;
        digest.add(mean);
        digest.add(coverage);
        return digest.value();
    }

private:
    int64_t pixel(int64_t b, int64_t c, int64_t y, int64_t x) const {
        return place({b, c, y, x}, {s_.batch, s_.channels, s_.height, s_.width});
    }

    Inputs<Kind> in_;
    const Sizes& s_ = in_.s;
    Strided<Stored> patches_;
    double fill_;
    std::vector<double> totals_, expected_, bounds_;
};

template <typename Kind>
class Backward : public Case {
public:
    using Stored = typename Types<Kind>::Stored;
    using Sum = typename Types<Kind>::Sum;

    Backward(Random& random, bool large)
        : in_(random, large),
          grad_(random, {s_.batch, s_.channels, s_.height, s_.width}),
          total_(random, s_.totals()),
          expected_(s_.patches(), 0),
          bounds_(s_.patches(), 1e-37) {
        fill_with<Kind>(random, grad_, random.chance(30));
        const std::vector<double> totals = in_.totals();
        for (int64_t i = 0; i < s_.totals(); ++i) total_[i] = static_cast<Sum>(totals[i]);
        in_.each([&](auto b, auto k, auto i, auto j, auto y, auto x, Sum w) {
            for (int64_t c = 0; c < s_.channels; ++c) {
                const int64_t n = place({b, k, c, i, j}, {s_.batch, s_.count, s_.channels, s_.patch, s_.patch});
                const double total = total_[place({b, y, x}, {s_.batch, s_.height, s_.width})];
                expected_[n] = Types<Kind>::wide(grad_.at({b, c, y, x})) / total * w;
                bounds_[n] += Types<Kind>::kRounding * std::fabs(expected_[n]);
            }
        });
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<Stored> patches = output<Stored>(random, s_.patches());
        EXPECT_CODE(ICSEG_OK, backward(Kind(), grad_.data(), total_.data(), in_.coords.data(), in_.weights(),
                                       patches.data(), s_, grad_.strides, in_.coords.type() == ICSEG_COORDS_INT32));
        expect_near<Kind>("patches", random, patches, expected_, bounds_);
        Digest digest;
        digest.add(patches);
        return digest.value();
    }

private:
    Inputs<Kind> in_;
    const Sizes& s_ = in_.s;
    Strided<Stored> grad_;
    Array<Sum> total_;
    std::vector<double> expected_, bounds_;
};

void errors() {
    const int64_t huge = int64_t(1) << 62;
    struct Row {
        int code;
        Sizes sizes;
    };
    const Row rows[] = {
        {ICSEG_NEGATIVE_SIZE, {-1, 1, 1, 2, 4, 4}},   {ICSEG_NEGATIVE_SIZE, {1, INT64_MIN, 1, 2, 4, 4}},
        {ICSEG_NEGATIVE_SIZE, {1, 1, -1, 2, 4, 4}},   {ICSEG_NEGATIVE_SIZE, {1, 1, 1, 2, -4, 4}},
        {ICSEG_NEGATIVE_SIZE, {1, 1, 1, 2, 4, -4}},   {ICSEG_PATCH_SIZE, {1, 1, 1, 0, 4, 4}},
        {ICSEG_PATCH_SIZE, {1, 1, 1, INT64_MIN, 4, 4}}, {ICSEG_TOO_LARGE, {1, 1, 1, 2, huge, huge}},
        {ICSEG_TOO_LARGE, {1, huge, 1, 2, 4, 4}},     {ICSEG_TOO_LARGE, {1, 1, huge, 2, 4, 4}},
        {ICSEG_TOO_LARGE, {huge, 1, 1, 2, 4, 4}},     {ICSEG_TOO_LARGE, {1, 1, 1, huge, 4, 4}},
        {ICSEG_OK, {0, 1, 1, 2, 4, 4}},
    };
    const std::vector<int64_t> strides(5, 0);
    const float* const f32 = nullptr;
    const double* const f64 = nullptr;
    const uint16_t* const bf16 = nullptr;
    for (const Row& row : rows) {
        const Sizes& s = row.sizes;
        EXPECT_CODE(row.code, scatter(1.f, f32, nullptr, nullptr, nullptr, nullptr, nullptr, 0, s, strides, false));
        EXPECT_CODE(row.code, scatter(1., f64, nullptr, nullptr, nullptr, nullptr, nullptr, 0, s, strides, true));
        EXPECT_CODE(row.code, scatter(Bfloat16(), bf16, nullptr, nullptr, nullptr, nullptr, nullptr, 0, s, strides, true));
        EXPECT_CODE(row.code, backward(1.f, f32, nullptr, nullptr, nullptr, nullptr, s, strides, false));
        EXPECT_CODE(row.code, backward(1., f64, nullptr, nullptr, nullptr, nullptr, s, strides, true));
        EXPECT_CODE(row.code, backward(Bfloat16(), bf16, nullptr, nullptr, nullptr, nullptr, s, strides, true));
    }
}

std::unique_ptr<Case> make(Random& random, bool large) {
    switch (random.integer(0, 5)) {
        case 0: return std::make_unique<Scatter<float>>(random, large);
        case 1: return std::make_unique<Scatter<double>>(random, large);
        case 2: return std::make_unique<Scatter<Bfloat16>>(random, large);
        case 3: return std::make_unique<Backward<float>>(random, large);
        case 4: return std::make_unique<Backward<double>>(random, large);
        default: return std::make_unique<Backward<Bfloat16>>(random, large);
    }
}

const Test test("scatter_patches", make, errors);

}  // namespace
