// icseg_gumbel_topk by sorting, its gradient, and the noise by a plain Philox4x32-10.
#include "testing.h"

#include <algorithm>

namespace {

using namespace testing;

struct Sizes {
    int64_t batch, count, k;

    Sizes(Random& random, bool large) : batch(random.size(3)), count(random.size(random.chance(40) ? 3000 : 60)) {
        k = random.chance(20) ? count : random.integer(0, count);
        if (large) batch = 3, count = 20000, k = random.pick<int64_t>({1, 64, 1000});
    }
};

// The noise of an element as the contract defines it, but with the true logarithm.
double noise_of(uint64_t seed, uint32_t row, int64_t element, uint32_t stream, uint32_t offset) {
    uint32_t c[4] = {static_cast<uint32_t>(element >> 2), row, stream, offset};
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t(0xD2511F53) * c[0], b = uint64_t(0xCD9E8D57) * c[2];
        const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(b),
                                  static_cast<uint32_t>(a >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(a)};
        std::copy(next, next + 4, c);
        key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
    }
    const float v = std::fmin((static_cast<float>(c[element & 3]) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
    return -std::log(-std::log1p(-static_cast<double>(v)));
}

// Rows some way apart, the elements of each contiguous.
template <typename Real>
struct Rows {
    Rows(Random& random, int64_t batch, int64_t count, bool hostile)
        : stride(random.chance(30) ? count + random.integer(0, 5) : random.chance(10) ? 0 : count),
          values(normals<Real>(random, batch ? (batch - 1) * stride + count : 0, hostile)) {}
    Real at(int64_t b, int64_t i) const { return values[b * stride + i]; }

    int64_t stride;
    Array<Real> values;
};

template <typename Real>
class Draw : public Case {
public:
    enum Noise { none, given, seeded };

    Draw(Random& random, bool large)
        : s_(random, large),
          logits_(random, s_.batch, s_.count, random.chance(50)),
          noise_(random, s_.batch, s_.count, random.chance(30)),
          kind_(random.pick({none, given, seeded, seeded})),
          seed_(random.bits()) {
        if (random.chance(20))  // ties
            for (int64_t i = 0; i < logits_.values.count(); ++i) logits_.values[i] = static_cast<Real>(random.integer(0, 2));
        std::vector<float> own(s_.batch * s_.count);
        CHECK(icseg_gumbel_noise(own.data(), s_.batch, s_.count, seed_, 0, 0) == ICSEG_OK);
        for (int64_t b = 0; b < s_.batch; ++b) {
            std::vector<Real> scores;
            std::vector<int64_t> order;
            double sum = 0, most = -INFINITY;
            for (int64_t i = 0; i < s_.count; ++i) {
                Real logit = logits_.at(b, i);
                logit = logit != logit ? Real(-INFINITY) : logit;
                const Real added = kind_ == none ? Real(0) : kind_ == given ? noise_.at(b, i) : Real(own[b * s_.count + i]);
                const Real score = kind_ == none ? logit : logit + added;
                scores.push_back(score != score ? Real(-INFINITY) : score);
                most = std::fmax(most, static_cast<double>(logit));
                order.push_back(i);
            }
            for (int64_t i = 0; i < s_.count; ++i)
                if (logits_.at(b, i) == logits_.at(b, i)) sum += std::exp(static_cast<double>(logits_.at(b, i)) - most);
            logsumexp_.push_back(std::isinf(most) ? most : most + std::log(sum));
            std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return scores[i] > scores[j]; });
            for (int64_t i = 0; i <= s_.k; ++i) {
                const bool drawn = i < s_.count && scores[order[i]] > -INFINITY;
                (i < s_.k ? indices_ : kappa_index_).push_back(drawn ? order[i] : -1);
                (i < s_.k ? scores_ : kappa_).push_back(drawn ? scores[order[i]] : Real(-INFINITY));
            }
        }
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<int64_t> indices = output<int64_t>(random, s_.batch * s_.k);
        const Array<int64_t> kappa_index = output<int64_t>(random, s_.batch);
        const Array<Real> scores = output<Real>(random, s_.batch * s_.k), kappa = output<Real>(random, s_.batch);
        const Array<Real> logsumexp = output<Real>(random, s_.batch);
        // As much as the header says, for one row or several.
        const int64_t row = s_.k <= 256 ? 0 : 4 * sizeof(Real) * (std::min(s_.count, 2 * s_.k + 258) + 1);
        const Array<Quad> workspace = output<Quad>(random, (row * random.integer(1, 3) + 15) / 16);
        EXPECT_CODE(ICSEG_OK, draw(indices.data(), scores.data(), logsumexp.data(), kappa.data(), kappa_index.data(),
                                   row ? workspace.data() : nullptr, row ? workspace.count() * 16 / row * row : 0));
        expect_equal("indices", indices, indices_);
        expect_equal("kappa_index", kappa_index, kappa_index_);
        expect_equal("scores", scores, scores_);
        expect_equal("kappa", kappa, kappa_);
        std::vector<double> bounds;
        for (const double value : logsumexp_) bounds.push_back((sizeof(Real) == 4 ? 2e-6 : 1e-13) * (1 + std::fabs(value)));
        expect_close("logsumexp", logsumexp, logsumexp_, bounds);
        if (row) {
            EXPECT_CODE(ICSEG_WORKSPACE, draw(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, row - 1));
            EXPECT_CODE(ICSEG_WORKSPACE, draw(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0));
        }
        Digest digest;
        digest.add(indices);
        digest.add(logsumexp);
        return digest.value();
    }

private:
    struct alignas(16) Quad {
        char bytes[16];
    };

    int draw(int64_t* indices, float* scores, float* logsumexp, float* kappa, int64_t* kappa_index, void* workspace,
             int64_t bytes) const {
        return icseg_gumbel_topk_f32(float_of(logits_), kind_ == given ? float_of(noise_) : nullptr, indices, scores,
                                     logsumexp, kappa, kappa_index, workspace, bytes, s_.batch, s_.count, s_.k,
                                     logits_.stride, noise_.stride, kind_ == seeded, seed_);
    }
    int draw(int64_t* indices, double* scores, double* logsumexp, double* kappa, int64_t* kappa_index, void* workspace,
             int64_t bytes) const {
        return icseg_gumbel_topk_f64(double_of(logits_), kind_ == given ? double_of(noise_) : nullptr, indices, scores,
                                     logsumexp, kappa, kappa_index, workspace, bytes, s_.batch, s_.count, s_.k,
                                     logits_.stride, noise_.stride, kind_ == seeded, seed_);
    }
    int draw(std::nullptr_t, std::nullptr_t, std::nullptr_t, std::nullptr_t, std::nullptr_t, std::nullptr_t,
             int64_t bytes) const {
        Real* const nothing = nullptr;
        return draw(static_cast<int64_t*>(nullptr), nothing, nothing, nothing, static_cast<int64_t*>(nullptr),
                    static_cast<void*>(nullptr), bytes);
    }
    static const float* float_of(const Rows<float>& rows) { return rows.values.data(); }
    static const float* float_of(const Rows<double>&) { return nullptr; }
    static const double* double_of(const Rows<double>& rows) { return rows.values.data(); }
    static const double* double_of(const Rows<float>&) { return nullptr; }

    Sizes s_;
    Rows<Real> logits_, noise_;
    Noise kind_;
    uint64_t seed_;
    std::vector<int64_t> indices_, kappa_index_;
    std::vector<Real> scores_, kappa_;
    std::vector<double> logsumexp_;
};

int draw_backward(const float* logits, const int64_t* indices, const int64_t* kappa_index, const float* logsumexp,
                  const float* scores, const float* sums, const float* kappa, float* grad, const Sizes& s, int64_t t) {
    return icseg_gumbel_topk_backward_f32(logits, indices, kappa_index, logsumexp, scores, sums, kappa, grad, s.batch,
                                          s.count, s.k, t);
}

int draw_backward(const double* logits, const int64_t* indices, const int64_t* kappa_index, const double* logsumexp,
                  const double* scores, const double* sums, const double* kappa, double* grad, const Sizes& s, int64_t t) {
    return icseg_gumbel_topk_backward_f64(logits, indices, kappa_index, logsumexp, scores, sums, kappa, grad, s.batch,
                                          s.count, s.k, t);
}

// Indices need not be those of a draw: any value goes where it says, or nowhere.
template <typename Real>
class Backward : public Case {
public:
    Backward(Random& random, bool large)
        : s_(random, large),
          logits_(random, s_.batch, s_.count, false),
          of_noise_(random.chance(30)),
          indices_(random, s_.batch * s_.k),
          kappa_index_(random, s_.batch),
          logsumexp_(random, s_.batch),
          scores_(normals<Real>(random, s_.batch * s_.k)),
          sums_(normals<Real>(random, s_.batch)),
          kappa_(normals<Real>(random, s_.batch)),
          expected_(s_.batch * s_.count, 0) {
        for (int64_t b = 0; b < s_.batch; ++b) {
            std::vector<int64_t> elements(s_.count);
            for (int64_t i = 0; i < s_.count; ++i) std::swap(elements[i] = i, elements[random.integer(0, i)]);
            double sum = 0;
            for (int64_t i = 0; i < s_.count; ++i) sum += std::exp(static_cast<double>(logits_.at(b, i)));
            logsumexp_[b] = static_cast<Real>(std::log(sum));
            for (int64_t i = 0; i <= s_.k; ++i) {
                int64_t element = i < s_.count ? elements[i] : -1;
                if (random.chance(10)) element = random.pick<int64_t>({INT64_MIN, -1, s_.count, INT64_MAX});
                (i < s_.k ? indices_[b * s_.k + i] : kappa_index_[b]) = element;
                if (element >= 0 && element < s_.count)
                    expected_[b * s_.count + element] += i < s_.k ? scores_[b * s_.k + i] : kappa_[b];
            }
            for (int64_t i = 0; i < s_.count && !of_noise_; ++i)
                expected_[b * s_.count + i] += sums_[b] * std::exp(static_cast<double>(logits_.at(b, i)) - logsumexp_[b]);
        }
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<Real> grad = output<Real>(random, s_.batch * s_.count);
        EXPECT_CODE(ICSEG_OK, draw_backward(of_noise_ ? nullptr : logits_.values.data(), indices_.data(),
                                            kappa_index_.data(), of_noise_ ? nullptr : logsumexp_.data(), scores_.data(),
                                            of_noise_ ? nullptr : sums_.data(), kappa_.data(), grad.data(), s_,
                                            logits_.stride));
        expect_close("grad", grad, expected_, {sizeof(Real) == 4 ? 1e-5 : 1e-13});
        Digest digest;
        digest.add(grad);
        return digest.value();
    }

private:
    Sizes s_;
    Rows<Real> logits_;
    bool of_noise_;
    Array<int64_t> indices_, kappa_index_;
    Array<Real> logsumexp_, scores_, sums_, kappa_;
    std::vector<double> expected_;
};

class NoiseAlone : public Case {
public:
    NoiseAlone(Random& random, bool large)
        : rows_(random.size(4)),
          elements_(large ? 40000 : random.size(300)),
          seed_(random.bits()),
          stream_(random.chance(50) ? 0 : static_cast<uint32_t>(random.bits())),
          offset_(random.chance(50) ? 0 : static_cast<uint32_t>(random.bits())) {
        for (int64_t b = 0; b < rows_; ++b)
            for (int64_t i = 0; i < elements_; ++i)
                expected_.push_back(noise_of(seed_, static_cast<uint32_t>(b), i, stream_, offset_));
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<float> noise = output<float>(random, rows_ * elements_);
        EXPECT_CODE(ICSEG_OK, icseg_gumbel_noise(noise.data(), rows_, elements_, seed_, stream_, offset_));
        expect_close("noise", noise, expected_, {4e-6});
        Digest digest;
        digest.add(noise);
        return digest.value();
    }

private:
    int64_t rows_, elements_;
    uint64_t seed_;
    uint32_t stream_, offset_;
    std::vector<double> expected_;
};

void errors() {
    const int64_t huge = int64_t(1) << 62;
    struct Row {
        int code;
        int64_t batch, count, k;
    };
    const Row rows[] = {
        {ICSEG_NEGATIVE_SIZE, -1, 4, 2},        {ICSEG_NEGATIVE_SIZE, 1, INT64_MIN, 2}, {ICSEG_NEGATIVE_SIZE, 1, 4, -1},
        {ICSEG_DRAWS, 1, 4, 5},                 {ICSEG_DRAWS, 1, 4, INT64_MAX},         {ICSEG_TOO_LARGE, huge, 4, 2},
        {ICSEG_TOO_LARGE, 1, int64_t(1) << 31, 2}, {ICSEG_TOO_LARGE, huge, huge, 2},     {ICSEG_OK, 0, 4, 2},
    };
    for (const Row& row : rows) {
        Random random(0);
        Sizes s(random, false);
        s.batch = row.batch, s.count = row.count, s.k = row.k;
        EXPECT_CODE(row.code, icseg_gumbel_topk_f32(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                                                    0, row.batch, row.count, row.k, 0, 0, 1, 0));
        EXPECT_CODE(row.code, icseg_gumbel_topk_f64(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                                                    0, row.batch, row.count, row.k, 0, 0, 1, 0));
        const float* const f32 = nullptr;
        const double* const f64 = nullptr;
        EXPECT_CODE(row.code, draw_backward(f32, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, s, 0));
        EXPECT_CODE(row.code, draw_backward(f64, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, s, 0));
    }
    EXPECT_CODE(ICSEG_NEGATIVE_SIZE, icseg_gumbel_noise(nullptr, -1, 1, 0, 0, 0));
    EXPECT_CODE(ICSEG_NEGATIVE_SIZE, icseg_gumbel_noise(nullptr, 1, 1, 0, -1, 0));
    EXPECT_CODE(ICSEG_TOO_LARGE, icseg_gumbel_noise(nullptr, 1, INT64_MAX, 0, 0, 0));
    EXPECT_CODE(ICSEG_TOO_LARGE, icseg_gumbel_noise(nullptr, 1, 1, 0, int64_t(1) << 32, 0));
    EXPECT_CODE(ICSEG_TOO_LARGE, icseg_gumbel_noise(nullptr, 1, 1, 0, 0, int64_t(1) << 32));
    EXPECT_CODE(ICSEG_TOO_LARGE, icseg_gumbel_noise(nullptr, huge, 1, 0, 0, 0));
    EXPECT_CODE(ICSEG_OK, icseg_gumbel_noise(nullptr, 0, 9, 0, 0, 0));
}

std::unique_ptr<Case> make(Random& random, bool large) {
    switch (random.integer(0, 6)) {
        case 0:
        case 1: return std::make_unique<Draw<float>>(random, large);
        case 2:
        case 3: return std::make_unique<Draw<double>>(random, large);
        case 4: return std::make_unique<Backward<float>>(random, large);
        case 5: return std::make_unique<Backward<double>>(random, large);
        default: return std::make_unique<NoiseAlone>(random, large);
    }
}

const Test test("gumbel_topk", make, errors);

}  // namespace
