// icseg_cross_tail and its gradient, element by element.
#include "testing.h"

namespace {

using namespace testing;

enum Activation { kNone, kRelu, kLeaky, kGelu };

double activated(double x, int64_t activation, double slope) {
    switch (activation) {
        case kRelu: return x < 0 ? 0 : x;
        case kLeaky: return x > 0 ? x : slope * x;
        case kGelu: return 0.5 * x * (1 + std::erf(x * std::sqrt(0.5)));
        default: return x;
    }
}

double derivative(double x, int64_t activation, double slope) {
    switch (activation) {
        case kRelu: return x > 0;
        case kLeaky: return x > 0 ? 1 : slope;
        case kGelu: return 0.5 * (1 + std::erf(x * std::sqrt(0.5))) + x * std::exp(-0.5 * x * x) * 0.3989422804014327;
        default: return 1;
    }
}

struct Sizes {
    int64_t batch, xs, ys, length, activation;
    double slope;

    Sizes(Random& random, bool large)
        : batch(random.size(3)),
          xs(random.size(3)),
          ys(random.size(4)),
          length(random.size(random.chance(30) ? 700 : 40)),
          activation(random.integer(0, 3)),
          slope(random.pick({0.01, 0.5, -0.3, 0.0, 2.0})) {
        if (large) batch = 2, xs = 2, ys = 5, length = 9000;
    }

    int64_t x(int64_t b, int64_t i, int64_t n) const { return (b * xs + i) * length + n; }
    int64_t y(int64_t b, int64_t j, int64_t n) const { return (b * ys + j) * length + n; }
    int64_t pair(int64_t b, int64_t i, int64_t j, int64_t n) const { return ((b * xs + i) * ys + j) * length + n; }
    template <typename Visit>
    void each(const Visit& visit) const {
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t i = 0; i < xs; ++i)
                for (int64_t j = 0; j < ys; ++j)
                    for (int64_t n = 0; n < length; ++n) visit(b, i, j, n);
    }
};

int tail(const float* zx, const float* zy, float* pairs, float* mean, const Sizes& s) {
    return icseg_cross_tail_f32(zx, zy, pairs, mean, s.batch, s.xs, s.ys, s.length, s.activation, s.slope);
}

int tail(const double* zx, const double* zy, double* pairs, double* mean, const Sizes& s) {
    return icseg_cross_tail_f64(zx, zy, pairs, mean, s.batch, s.xs, s.ys, s.length, s.activation, s.slope);
}

int tail_backward(const float* zx, const float* zy, const float* pairs, const float* mean, float* grad_zx,
                  float* grad_zy, const Sizes& s) {
    return icseg_cross_tail_backward_f32(zx, zy, pairs, mean, grad_zx, grad_zy, s.batch, s.xs, s.ys, s.length,
                                         s.activation, s.slope);
}

int tail_backward(const double* zx, const double* zy, const double* pairs, const double* mean, double* grad_zx,
                  double* grad_zy, const Sizes& s) {
    return icseg_cross_tail_backward_f64(zx, zy, pairs, mean, grad_zx, grad_zy, s.batch, s.xs, s.ys, s.length,
                                         s.activation, s.slope);
}

template <typename Real>
class Tail : public Case {
public:
    Tail(Random& random, bool large)
        : s_(random, large),
          hostile_(random.chance(30)),
          zx_(normals<Real>(random, s_.batch * s_.xs * s_.length, hostile_)),
          zy_(normals<Real>(random, s_.batch * s_.ys * s_.length, hostile_)),
          pairs_(s_.batch * s_.xs * s_.ys * s_.length, 0),
          mean_(zx_.count(), 0) {
        s_.each([&](auto b, auto i, auto j, auto n) {
            // Added in Real, as the definition does: of huge values nothing else is close.
            const Real sum = zx_[s_.x(b, i, n)] + zy_[s_.y(b, j, n)];
            const double value = activated(sum, s_.activation, s_.slope);
            pairs_[s_.pair(b, i, j, n)] = value;
            mean_[s_.x(b, i, n)] += value / s_.ys;
        });
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<Real> pairs = output<Real>(random, pairs_.size()), mean = output<Real>(random, zx_.count());
        const Array<Real> only = output<Real>(random, zx_.count());
        EXPECT_CODE(ICSEG_OK, tail(zx_.data(), zy_.data(), pairs.data(), mean.data(), s_));
        EXPECT_CODE(ICSEG_OK, tail(zx_.data(), zy_.data(), nullptr, only.data(), s_));
        if (switching()) return 0;
        Digest digest;
        digest.add(pairs);
        if (s_.ys) digest.add(mean);
        // The same but for which of two NaNs an addition keeps. GELU's rounding is the instruction set's, which another
        // thread may have changed since the call before.
        const double apart = s_.activation == kGelu ? (sizeof(Real) == 4 ? 1e-5 : 1e-13) : 0;
        for (int64_t i = 0; s_.ys && i < mean.count(); ++i)
            if (!(std::isnan(mean[i]) ? std::isnan(only[i])
                                      : mean[i] == only[i] ||
                                            std::fabs(mean[i] - only[i]) <= apart * (1 + std::fabs(mean[i]))))
                fail("mean[%lld] is %.9g, without pairs %.9g", (long long)i, mean[i] + 0.0, only[i] + 0.0);
        if (s_.xs == 1 && pairs.count()) {  // in place
            const Array<Real> zy = output<Real>(random, zy_.count());
            std::memcpy(zy.data(), zy_.data(), zy.count() * sizeof(Real));
            EXPECT_CODE(ICSEG_OK, tail(zx_.data(), zy.data(), zy.data(), nullptr, s_));
            CHECK(std::memcmp(pairs.data(), zy.data(), zy.count() * sizeof(Real)) == 0);
        }
        if (!hostile_) {
            const double bound = sizeof(Real) == 4 ? 4e-6 : 1e-13;
            expect_close("pairs", pairs, pairs_, {bound});
            if (s_.ys) expect_close("mean", mean, mean_, {2 * bound});
        } else if (s_.activation != kGelu) {
            for (int64_t i = 0; i < pairs.count(); ++i)
                CHECK(std::isnan(pairs_[i]) ? std::isnan(pairs[i])
                                            : pairs[i] == pairs_[i] || std::fabs(pairs[i] - pairs_[i]) <=
                                                                           1e-5 * std::fabs(pairs_[i]) + 1e-38);
        }
        return digest.value();
    }

private:
    Sizes s_;
    bool hostile_;
    Array<Real> zx_, zy_;
    std::vector<double> pairs_, mean_;
};

template <typename Real>
class Backward : public Case {
public:
    Backward(Random& random, bool large)
        : s_(random, large),
          zx_(normals<Real>(random, s_.batch * s_.xs * s_.length)),
          zy_(normals<Real>(random, s_.batch * s_.ys * s_.length)),
          of_pairs_(normals<Real>(random, random.chance(70) ? s_.batch * s_.xs * s_.ys * s_.length : 0)),
          of_mean_(normals<Real>(random, random.chance(70) ? zx_.count() : 0)),
          grad_zx_(zx_.count(), 0),
          grad_zy_(zy_.count(), 0) {
        s_.each([&](auto b, auto i, auto j, auto n) {
            double grad = of_pairs_.count() ? of_pairs_[s_.pair(b, i, j, n)] : 0;
            if (of_mean_.count()) grad += static_cast<double>(of_mean_[s_.x(b, i, n)]) / s_.ys;
            const Real sum = zx_[s_.x(b, i, n)] + zy_[s_.y(b, j, n)];
            grad *= derivative(sum, s_.activation, s_.slope);
            grad_zx_[s_.x(b, i, n)] += grad;
            grad_zy_[s_.y(b, j, n)] += grad;
        });
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<Real> zx = output<Real>(random, zx_.count()), zy = output<Real>(random, zy_.count());
        EXPECT_CODE(ICSEG_OK, tail_backward(zx_.data(), zy_.data(), of_pairs_.count() ? of_pairs_.data() : nullptr,
                                            of_mean_.count() ? of_mean_.data() : nullptr, zx.data(), zy.data(), s_));
        const double bound = sizeof(Real) == 4 ? 3e-5 : 1e-12;
        expect_close("grad_zx", zx, grad_zx_, {bound});
        expect_close("grad_zy", zy, grad_zy_, {bound});
        Digest digest;
        digest.add(zx);
        digest.add(zy);
        return digest.value();
    }

private:
    Sizes s_;
    Array<Real> zx_, zy_, of_pairs_, of_mean_;
    std::vector<double> grad_zx_, grad_zy_;
};

void errors() {
    const int64_t huge = int64_t(1) << 62;
    struct Row {
        int code;
        int64_t batch, xs, ys, length, activation;
    };
    const Row rows[] = {
        {ICSEG_NEGATIVE_SIZE, -1, 1, 1, 1, 0},         {ICSEG_NEGATIVE_SIZE, 1, -1, 1, 1, 0},
        {ICSEG_NEGATIVE_SIZE, 1, 1, INT64_MIN, 1, 0},  {ICSEG_NEGATIVE_SIZE, 1, 1, 1, -1, 0},
        {ICSEG_ACTIVATION, 1, 1, 1, 1, -1},            {ICSEG_ACTIVATION, 1, 1, 1, 1, 4},
        {ICSEG_ACTIVATION, 1, 1, 1, 1, INT64_MAX},     {ICSEG_TOO_LARGE, huge, 1, 1, 4, 0},
        {ICSEG_TOO_LARGE, 1, huge, huge, 1, 0},        {ICSEG_TOO_LARGE, 1, 1, 1, huge, 0},
        {ICSEG_OK, 0, 1, 1, 1, 0},
    };
    for (const Row& row : rows) {
        Random random(0);
        Sizes s(random, false);
        s.batch = row.batch, s.xs = row.xs, s.ys = row.ys, s.length = row.length, s.activation = row.activation;
        float* const f32 = nullptr;
        double* const f64 = nullptr;
        EXPECT_CODE(row.code, tail(f32, f32, f32, f32, s));
        EXPECT_CODE(row.code, tail(f64, f64, f64, f64, s));
        EXPECT_CODE(row.code, tail_backward(f32, f32, f32, f32, f32, f32, s));
        EXPECT_CODE(row.code, tail_backward(f64, f64, f64, f64, f64, f64, s));
    }
}

std::unique_ptr<Case> make(Random& random, bool large) {
    switch (random.integer(0, 3)) {
        case 0: return std::make_unique<Tail<float>>(random, large);
        case 1: return std::make_unique<Tail<double>>(random, large);
        case 2: return std::make_unique<Backward<float>>(random, large);
        default: return std::make_unique<Backward<double>>(random, large);
    }
}

const Test test("cross_conv", make, errors);

}  // namespace
