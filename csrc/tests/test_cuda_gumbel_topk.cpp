// icseg_cuda_gumbel_topk on the CPU, against icseg_gumbel_topk.
#include "cuda_on_cpu.h"

#include "../cuda/gumbel_topk.cu"

namespace {

using namespace testing;

struct Sizes {
    int64_t batch, count, k;

    Sizes(Random& random, bool large) : batch(random.size(2)) {
        count = random.size(random.pick<int64_t>({9, 60, 1024, 1100}));
        if (random.chance(8)) count = random.integer(3000, 4200);
        if (large) batch = 1, count = random.pick<int64_t>({16384, 16389, 40001, 65536});
        k = random.chance(15) ? count : random.integer(0, random.chance(50) ? std::min<int64_t>(count, 40) : count);
        if (large) k = random.pick<int64_t>({0, 1, 64, 1000, 4095});
        if (k >= 4096) k = 4095;
    }
};

// The workspace of icseg_gumbel_topk for one row.
std::vector<float> workspace_of(const Sizes& s) { return std::vector<float>(4 * (std::min(s.count, 2 * s.k + 258) + 1) + 4); }

class Draw : public Case {
public:
    enum Noise { none, given, seeded };

    Draw(Random& random, bool large)
        : s_(random, large),
          stride_(s_.count + (random.chance(50) ? random.integer(0, 5) : 0)),
          noise_stride_(random.chance(20) ? 0 : s_.count),
          hostile_(random.chance(30)),
          logits_(normals<float>(random, s_.batch ? (s_.batch - 1) * stride_ + s_.count : 0, hostile_)),
          noise_(normals<float>(random, s_.batch ? (s_.batch - 1) * noise_stride_ + s_.count : 0, random.chance(30))),
          kind_(random.pick({none, given, seeded, seeded, seeded})),
          seed_(random.bits()),
          device_seed_(random, 1),
          seed_on_device_(random.chance(50)),
          indices_(s_.batch * s_.k),
          kappa_index_(s_.batch),
          scores_(s_.batch * s_.k),
          kappa_(s_.batch),
          logsumexp_(s_.batch) {
        device_seed_[0] = static_cast<int64_t>(seed_);
        const int kind = static_cast<int>(random.integer(0, 9));
        const float scale = random.pick({0.0f, 1e-3f, 30.0f});
        for (int64_t i = 0; i < logits_.count(); ++i) {
            if (kind == 0) logits_[i] = static_cast<float>(random.integer(0, 2));                 // ties
            if (kind == 1) logits_[i] *= scale;                                                   // flat, or dominated
            if (kind == 2 && !random.chance(3)) logits_[i] = -INFINITY;                           // few left
            if (kind == 3) logits_[i] = random.pick({0.0f, -0.0f});
            if (kind == 4) logits_[i] = i % 2 ? 0.0f : static_cast<float>(i) * 1e-3f;            // ever better
        }
        std::vector<float> workspace = workspace_of(s_);
        workspace.resize(workspace.size() + 4);
        void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 15) / 16 * 16);
        const int64_t bytes = s_.k <= 256 ? 0 : 16 * (std::min(s_.count, 2 * s_.k + 258) + 1);
        EXPECT_CODE(ICSEG_OK, icseg_gumbel_topk_f32(
                                  logits_.data(), noise(), indices_.data(), scores_.data(), logsumexp_.data(),
                                  kappa_.data(), kappa_index_.data(), bytes ? aligned : nullptr, bytes, s_.batch,
                                  s_.count, s_.k, stride_, noise_stride_, kind_ == seeded, seed_));
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<int64_t> indices = output<int64_t>(random, s_.batch * s_.k);
        const Array<int64_t> kappa_index = output<int64_t>(random, s_.batch);
        const Array<float> scores = output<float>(random, s_.batch * s_.k), kappa = output<float>(random, s_.batch);
        const Array<float> logsumexp = output<float>(random, s_.batch);
        CHECK(icseg_cuda_gumbel_topk_f32(logits_.data(), noise(), seed_on_device_ ? device_seed_.data() : nullptr,
                                         indices.data(), scores.data(), logsumexp.data(), kappa.data(),
                                         kappa_index.data(), s_.batch, s_.count, s_.k, stride_, noise_stride_,
                                         kind_ == seeded, seed_on_device_ ? 0 : seed_, nullptr) == ICSEG_CUDA_OK);
        expect_equal("indices", indices, indices_);
        expect_equal("kappa_index", kappa_index, kappa_index_);
        expect_equal("scores", scores, scores_);
        expect_equal("kappa", kappa, kappa_);
        std::vector<double> expected(logsumexp_.begin(), logsumexp_.end()), bounds;
        for (const double value : expected) bounds.push_back(2e-6 * (1 + std::fabs(value)));
        expect_close("logsumexp", logsumexp, expected, bounds);
        Digest digest;
        digest.add(indices);
        digest.add(logsumexp);
        return digest.value();
    }

private:
    const float* noise() const { return kind_ == given ? noise_.data() : nullptr; }

    Sizes s_;
    int64_t stride_, noise_stride_;
    bool hostile_;
    Array<float> logits_, noise_;
    Noise kind_;
    uint64_t seed_;
    Array<int64_t> device_seed_;
    bool seed_on_device_;
    std::vector<int64_t> indices_, kappa_index_;
    std::vector<float> scores_, kappa_, logsumexp_;
};

class Backward : public Case {
public:
    Backward(Random& random, bool large)
        : s_(random, large),
          of_noise_(random.chance(30)),
          logits_(normals<float>(random, s_.batch * s_.count, false)),
          indices_(random, s_.batch * s_.k),
          kappa_index_(random, s_.batch),
          logsumexp_(normals<float>(random, s_.batch)),
          scores_(normals<float>(random, s_.batch * s_.k)),
          sums_(normals<float>(random, s_.batch)),
          kappa_(normals<float>(random, s_.batch)),
          expected_(s_.batch * s_.count) {
        for (int64_t b = 0; b < s_.batch; ++b) {
            logsumexp_[b] += 5;
            std::vector<int64_t> elements(s_.count);
            for (int64_t i = 0; i < s_.count; ++i) std::swap(elements[i] = i, elements[random.integer(0, i)]);
            for (int64_t j = 0; j <= s_.k; ++j) {
                int64_t element = j < s_.count ? elements[j] : -1;
                if (random.chance(10)) element = random.pick<int64_t>({-1, s_.count, INT64_MIN, INT64_MAX});
                (j < s_.k ? indices_[b * s_.k + j] : kappa_index_[b]) = element;
            }
        }
        std::vector<float> grad(s_.batch * s_.count);
        EXPECT_CODE(ICSEG_OK, icseg_gumbel_topk_backward_f32(logits_.data(), indices_.data(), kappa_index_.data(),
                                                             logsumexp_.data(), scores_.data(),
                                                             of_noise_ ? nullptr : sums_.data(), kappa_.data(),
                                                             grad.data(), s_.batch, s_.count, s_.k, s_.count));
        expected_.assign(grad.begin(), grad.end());
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<float> grad = output<float>(random, s_.batch * s_.count);
        CHECK(icseg_cuda_gumbel_topk_backward_f32(logits_.data(), indices_.data(), kappa_index_.data(),
                                                  logsumexp_.data(), scores_.data(),
                                                  of_noise_ ? nullptr : sums_.data(), kappa_.data(), grad.data(),
                                                  s_.batch, s_.count, s_.k, s_.count, nullptr) == ICSEG_CUDA_OK);
        expect_close("grad", grad, expected_, {2e-6});
        Digest digest;
        digest.add(grad);
        return digest.value();
    }

private:
    Sizes s_;
    bool of_noise_;
    Array<float> logits_;
    Array<int64_t> indices_, kappa_index_;
    Array<float> logsumexp_, scores_, sums_, kappa_;
    std::vector<double> expected_;
};

int refused(int64_t batch, int64_t count, int64_t k) {
    return icseg_cuda_gumbel_topk_f32(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, batch,
                                      count, k, 0, 0, 1, 0, nullptr);
}

// Floats apart by so many of the smallest steps.
float moved(float value, int steps) {
    for (int i = 0; i < std::abs(steps); ++i) value = std::nextafter(value, steps < 0 ? -INFINITY : INFINITY);
    return value;
}

// No word is ruled out whose score exceeds the floor, least of all where it just does.
void nothing_is_ruled_out_that_exceeds_the_floor() {
    Random random(1);
    for (int i = 0; i < 300000; ++i) {
        const uint32_t word = static_cast<uint32_t>(random.bits()) >> random.integer(0, 31);
        const float logit = static_cast<float>(random.normal() * random.pick({1e-3, 1.0, 100.0, 1e6}));
        const float score = logit + icseg_cuda::gumbel(word), floor = moved(score, -static_cast<int>(random.integer(1, 3)));
        if (!icseg_cuda::may_exceed(logit, word, floor)) fail("logit %g and word %u may exceed %g", logit, word, floor);
        CHECK(icseg_cuda::may_exceed(logit, word, -INFINITY));
        CHECK(!icseg_cuda::may_exceed(NAN, word, floor) && !icseg_cuda::may_exceed(-INFINITY, word, floor));
    }
}

void errors() {
    nothing_is_ruled_out_that_exceeds_the_floor();
    CHECK(refused(-1, 4, 2) == ICSEG_CUDA_NEGATIVE_SIZE);
    CHECK(refused(1, INT64_MIN, 2) == ICSEG_CUDA_NEGATIVE_SIZE);
    CHECK(refused(1, 4, -1) == ICSEG_CUDA_NEGATIVE_SIZE);
    CHECK(refused(1, 4, 5) == ICSEG_CUDA_DRAWS);
    CHECK(refused(1, 4, INT64_MAX) == ICSEG_CUDA_DRAWS);
    CHECK(refused(int64_t(1) << 31, 4, 2) == ICSEG_CUDA_TOO_LARGE);
    CHECK(refused(1, int64_t(1) << 31, 2) == ICSEG_CUDA_TOO_LARGE);
    CHECK(refused(1, 5000, 4096) == ICSEG_CUDA_TOO_LARGE);
    CHECK(refused(0, 5000, 4095) == ICSEG_CUDA_OK);
    CHECK(refused(0, 4096, 4096) == ICSEG_CUDA_OK);
}

std::unique_ptr<Case> make(Random& random, bool large) {
    if (random.chance(80)) return std::make_unique<Draw>(random, large);
    return std::make_unique<Backward>(random, large);
}

const Test test("cuda_gumbel_topk", make, errors);

}  // namespace
