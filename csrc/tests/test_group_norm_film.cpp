// icseg_group_norm_film and its gradient, group by group.
#include "testing.h"

#include <algorithm>

namespace {

using namespace testing;

struct Sizes {
    int64_t samples, channels, length, groups, gelu;
    double eps;

    Sizes(Random& random, bool large)
        : samples(random.size(4)),
          length(random.size(random.chance(30) ? 400 : 30)),
          groups(random.integer(1, 4)),
          gelu(random.chance(50)),
          eps(random.pick({1e-5, 1e-3})) {
        channels = groups * random.size(5);
        if (large) samples = 6, groups = 4, channels = 32, length = 700;
    }

    int64_t place(int64_t n, int64_t c, int64_t i) const { return (n * channels + c) * length + i; }
    int64_t count() const { return samples * channels * length; }
};

// One value a channel, or a sample and channel, some way apart; or none.
template <typename Real>
struct Film {
    Film(Random& random, const Sizes& s)
        : given(random.chance(75)),
          channel(random.pick<int64_t>({0, 1, 3})),
          sample(random.chance(40) ? 0 : std::max<int64_t>(s.channels * channel, 1)),
          values(normals<Real>(random, given && s.samples && s.channels
                                           ? (s.samples - 1) * sample + (s.channels - 1) * channel + 1 : 0)) {}
    const Real* data() const { return given ? values.data() : nullptr; }
    double at(int64_t n, int64_t c, double otherwise) const { return given ? values[n * sample + c * channel] : otherwise; }

    bool given;
    int64_t channel, sample;
    Array<Real> values;
};

int normed(const float* x, const Film<float>& gain, const Film<float>& bias, float* out, float* stats, const Sizes& s) {
    return icseg_group_norm_film_f32(x, gain.data(), bias.data(), out, stats, s.samples, s.channels, s.length, s.groups,
                                     gain.sample, gain.channel, bias.sample, bias.channel, s.gelu, s.eps);
}

int normed(const double* x, const Film<double>& gain, const Film<double>& bias, double* out, double* stats,
           const Sizes& s) {
    return icseg_group_norm_film_f64(x, gain.data(), bias.data(), out, stats, s.samples, s.channels, s.length, s.groups,
                                     gain.sample, gain.channel, bias.sample, bias.channel, s.gelu, s.eps);
}

int normed_backward(const float* grad, const float* x, const float* stats, const Film<float>& gain,
                    const Film<float>& bias, float* grad_x, float* sums, const Sizes& s) {
    return icseg_group_norm_film_backward_f32(grad, x, stats, gain.data(), bias.data(), grad_x, sums, s.samples,
                                              s.channels, s.length, s.groups, gain.sample, gain.channel, bias.sample,
                                              bias.channel, s.gelu);
}

int normed_backward(const double* grad, const double* x, const double* stats, const Film<double>& gain,
                    const Film<double>& bias, double* grad_x, double* sums, const Sizes& s) {
    return icseg_group_norm_film_backward_f64(grad, x, stats, gain.data(), bias.data(), grad_x, sums, s.samples,
                                              s.channels, s.length, s.groups, gain.sample, gain.channel, bias.sample,
                                              bias.channel, s.gelu);
}

double gelu(double x) { return 0.5 * x * (1 + std::erf(x * std::sqrt(0.5))); }
double gelu_slope(double x) {
    return 0.5 * (1 + std::erf(x * std::sqrt(0.5))) + x * std::exp(-0.5 * x * x) * 0.3989422804014327;
}

template <typename Real>
class Norm : public Case {
public:
    Norm(Random& random, bool large)
        : s_(random, large),
          shift_(random.chance(30) ? 100 : 0),
          x_(normals<Real>(random, s_.count())),
          grad_(normals<Real>(random, s_.count())),
          gain_(random, s_),
          bias_(random, s_),
          out_(s_.count()),
          stats_(2 * s_.samples * s_.groups),
          grad_x_(s_.count()),
          sums_(2 * s_.samples * s_.channels) {
        for (int64_t i = 0; i < x_.count(); ++i) x_[i] += static_cast<Real>(shift_);
        const int64_t each = s_.channels / s_.groups, size = each * s_.length;
        for (int64_t n = 0; n < s_.samples; ++n)
            for (int64_t g = 0; g < s_.groups; ++g) {
                const auto over = [&](const auto& visit) {
                    for (int64_t c = g * each; c < (g + 1) * each; ++c)
                        for (int64_t i = 0; i < s_.length; ++i) visit(c, s_.place(n, c, i));
                };
                double mean = 0, variance = 0, of_normed = 0, of_product = 0;
                over([&](int64_t, int64_t i) { mean += x_[i]; });
                mean /= size;
                over([&](int64_t, int64_t i) { variance += (x_[i] - mean) * (x_[i] - mean); });
                const double rstd = 1 / std::sqrt(variance / size + s_.eps);
                stats_[n * s_.groups + g] = mean;
                stats_[(s_.samples + n) * s_.groups + g] = rstd;
                const auto slope = [&](int64_t c, int64_t i, double* normed) {
                    *normed = (x_[i] - mean) * rstd;
                    const double value = gain_.at(n, c, 1) * *normed + bias_.at(n, c, 0);
                    out_[i] = s_.gelu ? gelu(value) : value;
                    return grad_[i] * (s_.gelu ? gelu_slope(value) : 1);
                };
                over([&](int64_t c, int64_t i) {
                    double normed;
                    const double grad = slope(c, i, &normed);
                    sums_[n * s_.channels + c] += grad * normed;
                    sums_[(s_.samples + n) * s_.channels + c] += grad;
                    of_normed += grad * gain_.at(n, c, 1) / size;
                    of_product += grad * gain_.at(n, c, 1) * normed / size;
                });
                over([&](int64_t c, int64_t i) {
                    double normed;
                    const double grad = slope(c, i, &normed);
                    grad_x_[i] = rstd * (grad * gain_.at(n, c, 1) - of_normed - normed * of_product);
                });
            }
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<Real> out = output<Real>(random, s_.count()), stats = output<Real>(random, stats_.size());
        const Array<Real> grad_x = output<Real>(random, s_.count()), sums = output<Real>(random, sums_.size());
        EXPECT_CODE(ICSEG_OK, normed(x_.data(), gain_, bias_, out.data(), stats.data(), s_));
        EXPECT_CODE(ICSEG_OK,
                    normed_backward(grad_.data(), x_.data(), stats.data(), gain_, bias_, grad_x.data(), sums.data(), s_));
        Digest digest;
        digest.add(out);
        digest.add(grad_x);
        digest.add(sums);
        if (s_.count() == 0) return digest.value();
        // A group of equal values (or one) divides rounding errors by sqrt(eps).
        const int64_t size = s_.channels / s_.groups * s_.length;
        const double bound = (sizeof(Real) == 4 ? 2e-5 : 1e-12) * (1 + shift_) * (size < 4 ? 1e3 : 1);
        expect_close("out", out, out_, {8 * bound});
        expect_close("grad_x", grad_x, grad_x_, {(size < 16 ? 1e5 : 64) * bound});
        expect_close("sums", sums, sums_, {static_cast<double>(s_.length + 32) * bound});
        for (size_t i = 0; i < stats_.size(); ++i)
            CHECK(std::fabs(stats[i] - stats_[i]) <= bound * (1 + std::fabs(stats_[i])));
        return digest.value();
    }

private:
    Sizes s_;
    double shift_;
    Array<Real> x_, grad_;
    Film<Real> gain_, bias_;
    std::vector<double> out_, stats_, grad_x_, sums_;
};

template <typename Real>
void errors_of() {
    const int64_t huge = int64_t(1) << 62;
    struct Row {
        int code;
        int64_t samples, channels, length, groups;
    };
    const Row rows[] = {
        {ICSEG_NEGATIVE_SIZE, -1, 4, 4, 2},        {ICSEG_NEGATIVE_SIZE, 1, -4, 4, 2}, {ICSEG_NEGATIVE_SIZE, 1, 4, INT64_MIN, 2},
        {ICSEG_GROUPS, 1, 4, 4, 0},                {ICSEG_GROUPS, 1, 4, 4, 3},         {ICSEG_GROUPS, 1, 4, 4, -2},
        {ICSEG_GROUPS, 1, 4, 4, INT64_MIN},        {ICSEG_TOO_LARGE, huge, 4, 4, 2},   {ICSEG_TOO_LARGE, 1, huge, 4, 2},
        {ICSEG_TOO_LARGE, 1, 4, huge, 2},          {ICSEG_OK, 0, 4, 4, 2},
    };
    for (const Row& row : rows) {
        Random random(0);
        Sizes s(random, false);
        const Film<Real> film(random, s);
        s.samples = row.samples, s.channels = row.channels, s.length = row.length, s.groups = row.groups;
        Real* const null = nullptr;
        EXPECT_CODE(row.code, normed(null, film, film, null, null, s));
        EXPECT_CODE(row.code, normed_backward(null, null, null, film, film, null, null, s));
    }
}

void errors() {
    errors_of<float>();
    errors_of<double>();
}

std::unique_ptr<Case> make(Random& random, bool large) {
    if (random.chance(50)) return std::make_unique<Norm<float>>(random, large);
    return std::make_unique<Norm<double>>(random, large);
}

const Test test("group_norm_film", make, errors);

}  // namespace
