// icseg_gather_patches and its adjoint, pixel by pixel.
#include "testing.h"

namespace {

using namespace testing;

struct Sizes {
    int64_t outer, inner, channels, height, width, count, patch;

    Sizes(Random& random, bool large)
        : outer(random.integer(0, 9) ? random.integer(1, 3) : 0),
          inner(random.integer(0, 9) ? random.integer(1, 3) : 0),
          channels(random.integer(0, 9) ? random.integer(1, 4) : 0),
          height(random.integer(0, 9) ? random.integer(1, 150) : 0),
          width(random.integer(0, 9) ? random.integer(1, 40) : 0),
          count(random.integer(0, 9) ? random.integer(1, 9) : 0),
          patch(random.integer(1, 20)) {
        if (large) *this = {2, 1, 3, 200, 120, 40, 24};
    }
    Sizes(int64_t o, int64_t i, int64_t c, int64_t h, int64_t w, int64_t k, int64_t p)
        : outer(o), inner(i), channels(c), height(h), width(w), count(k), patch(p) {}

    int64_t images() const { return outer * inner * channels * height * width; }
    int64_t patches() const { return outer * inner * count * channels * patch * patch; }
};

Array<int64_t> random_coords(Random& random, const Sizes& s) {
    Array<int64_t> coords(random, s.outer * s.inner * s.count * 2);
    for (int64_t n = 0; n < coords.count(); ++n)
        coords[n] = random.coordinate(n % 2 ? s.width : s.height, s.patch + 1);
    return coords;
}

// visit(o, b, k, c, i, j, y, x) for every pixel of every patch that lies inside its image, patches in order.
template <typename Visit>
void each_pixel(const Sizes& s, const Array<int64_t>& coords, const Visit& visit) {
    for (int64_t o = 0; o < s.outer; ++o)
        for (int64_t b = 0; b < s.inner; ++b)
            for (int64_t k = 0; k < s.count; ++k)
                for (int64_t c = 0; c < s.channels; ++c)
                    for (int64_t i = 0; i < s.patch; ++i)
                        for (int64_t j = 0; j < s.patch; ++j) {
                            const int64_t corner = ((o * s.inner + b) * s.count + k) * 2;
                            const __int128 y = __int128(coords[corner]) + i, x = __int128(coords[corner + 1]) + j;
                            if (y >= 0 && y < s.height && x >= 0 && x < s.width)
                                visit(o, b, k, c, i, j, static_cast<int64_t>(y), static_cast<int64_t>(x));
                        }
}

int64_t place(std::initializer_list<int64_t> index, std::initializer_list<int64_t> sizes) {
    int64_t n = 0;
    for (size_t d = 0; d < sizes.size(); ++d) n = n * sizes.begin()[d] + index.begin()[d];
    return n;
}

template <typename Element>
class Gather : public Case {
public:
    Gather(Random& random, bool large)
        : s_(random, large),
          source_(random, {s_.outer, s_.inner, s_.channels, s_.height, s_.width}),
          coords_(random_coords(random, s_)),
          expected_(s_.patches(), 0) {
        for (int64_t n = 0; n < source_.storage().count(); ++n)
            source_.storage()[n] = static_cast<Element>(random.bits());
        each_pixel(s_, coords_, [&](auto o, auto b, auto k, auto c, auto i, auto j, auto y, auto x) {
            expected_[place({o, b, k, c, i, j}, {s_.outer, s_.inner, s_.count, s_.channels, s_.patch, s_.patch})] =
                source_.at({o, b, c, y, x});
        });
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<Element> patches = output<Element>(random, s_.patches());
        const auto& t = source_.strides;
        EXPECT_CODE(ICSEG_OK, icseg_gather_patches(source_.data(), coords_.data(), patches.data(), s_.outer, s_.inner,
                                                   s_.channels, s_.height, s_.width, s_.count, s_.patch, t[0], t[1],
                                                   t[2], t[3], t[4], sizeof(Element)));
        expect_equal("patches", patches, expected_);
        Digest digest;
        digest.add(patches);
        return digest.value();
    }

private:
    Sizes s_;
    Strided<Element> source_;
    Array<int64_t> coords_;
    std::vector<Element> expected_;
};

int backward(const float* patches, const int64_t* coords, float* images, const Sizes& s,
             const std::vector<int64_t>& t) {
    return icseg_gather_patches_backward_f32(patches, coords, images, s.outer, s.inner, s.count, s.channels, s.patch,
                                             s.height, s.width, t[0], t[1], t[2], t[3], t[4], t[5]);
}

int backward(const double* patches, const int64_t* coords, double* images, const Sizes& s,
             const std::vector<int64_t>& t) {
    return icseg_gather_patches_backward_f64(patches, coords, images, s.outer, s.inner, s.count, s.channels, s.patch,
                                             s.height, s.width, t[0], t[1], t[2], t[3], t[4], t[5]);
}

template <typename Real>
class Backward : public Case {
public:
    Backward(Random& random, bool large)
        : s_(random, large),
          patches_(random, {s_.outer, s_.inner, s_.count, s_.channels, s_.patch, s_.patch}),
          coords_(random_coords(random, s_)),
          expected_(s_.images(), 0) {
        patches_.fill(random, false);
        each_pixel(s_, coords_, [&](auto o, auto b, auto k, auto c, auto i, auto j, auto y, auto x) {
            expected_[place({o, b, c, y, x}, {s_.outer, s_.inner, s_.channels, s_.height, s_.width})] +=
                patches_.at({o, b, k, c, i, j});
        });
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<Real> images = output<Real>(random, s_.images());
        EXPECT_CODE(ICSEG_OK, backward(patches_.data(), coords_.data(), images.data(), s_, patches_.strides));
        expect_equal("images", images, expected_);
        Digest digest;
        digest.add(images);
        return digest.value();
    }

private:
    Sizes s_;
    Strided<Real> patches_;
    Array<int64_t> coords_;
    std::vector<Real> expected_;
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
    for (const Row& row : rows) {
        const Sizes& s = row.sizes;
        EXPECT_CODE(row.code, icseg_gather_patches(nullptr, nullptr, nullptr, s.outer, s.inner, s.channels, s.height,
                                                   s.width, s.count, s.patch, 0, 0, 0, 0, 0, row.element_bytes));
        if (row.code == ICSEG_ELEMENT_BYTES) continue;
        const std::vector<int64_t> strides(6, 0);
        EXPECT_CODE(row.code, backward(static_cast<float*>(nullptr), nullptr, nullptr, s, strides));
        EXPECT_CODE(row.code, backward(static_cast<double*>(nullptr), nullptr, nullptr, s, strides));
    }
}

std::unique_ptr<Case> make(Random& random, bool large) {
    switch (random.integer(0, 5)) {
        case 0: return std::make_unique<Gather<uint8_t>>(random, large);
        case 1: return std::make_unique<Gather<uint16_t>>(random, large);
        case 2: return std::make_unique<Gather<uint32_t>>(random, large);
        case 3: return std::make_unique<Gather<uint64_t>>(random, large);
        case 4: return std::make_unique<Backward<float>>(random, large);
        default: return std::make_unique<Backward<double>>(random, large);
    }
}

const Test test("gather_patches", make, errors);

}  // namespace
