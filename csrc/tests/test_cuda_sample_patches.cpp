// icseg_cuda_sample_patches on the CPU, against icseg_sample_patches.
#include "cuda_on_cpu.h"

#include "../cuda/sample_patches.cu"

namespace {

using namespace testing;

class Windows : public Case {
public:
    Windows(Random& random, bool large)
        : batch_(large ? 1 : random.size(2)),
          height_(large ? random.pick<int64_t>({90, 120}) : random.integer(1, random.pick({9, 40}))),
          width_(large ? random.pick<int64_t>({91, 140}) : random.integer(1, random.pick({9, 60}))),
          taps_(1 + 2 * (random.chance(50) ? random.integer(0, random.pick({3, 63})) : 0)),
          kernel_(random, taps_),
          maps_(random, {batch_, height_, width_}),
          kind_(random.pick({none, given, seeded, seeded})),
          seed_(random.bits()),
          device_seed_(random, 1),
          device_temperature_(random, 1),
          on_device_(random.chance(50)) {
        windows_ = {};
        windows_.batch = batch_, windows_.height = height_, windows_.width = width_;
        windows_.before = random.integer(0, 5), windows_.after = random.integer(0, 5);
        const int64_t padding = windows_.before + windows_.after;
        windows_.patch = random.integer(1, std::min(std::min(height_, width_) + padding, random.pick<int64_t>({5, 60})));
        windows_.stride = random.chance(40) ? 1 : random.integer(1, 9);
        windows_.tap_count = taps_;
        windows_.taps = taps_ == 1 ? nullptr : kernel_.data();
        windows_.temperature = random.pick({1.0, 0.1, 0.003, 7.5});
        windows_.threads = 1;
        float sum = 0;
        for (int64_t i = 0; i < taps_; ++i) sum += kernel_[i] = static_cast<float>(0.05 + random.uniform());
        for (int64_t i = 0; i < taps_; ++i) kernel_[i] /= sum;
        maps_.fill(random, false);
        const int kind = static_cast<int>(random.integer(0, 5));
        maps_.each([&](float& pixel) {
            if (kind == 0) pixel = 0.25f;
            if (kind == 1 && random.chance(10)) pixel = random.pick<float>({NAN, INFINITY, -INFINITY});
            if (kind == 2) pixel = random.pick({0.0f, 1.0f});
            if (kind == 3) pixel = std::fabs(pixel) * 1e-3f;
        });
        if (random.chance(5)) maps_.each([&](float& pixel) { pixel = random.pick<float>({NAN, INFINITY, -INFINITY}); });
        windows_.stride_batch = maps_.strides[0];
        windows_.stride_y = maps_.strides[1], windows_.stride_x = maps_.strides[2];
        rows_ = (height_ + padding - windows_.patch) / windows_.stride + 1;
        columns_ = (width_ + padding - windows_.patch) / windows_.stride + 1;
        candidates_ = rows_ * columns_;
        k_ = std::min<int64_t>(ICSEG_CUDA_MOST_DRAWS, candidates_);
        if (!random.chance(10)) k_ = random.integer(0, std::min<int64_t>(k_, random.pick({12, 600})));
        noise_.resize(batch_ * candidates_);
        const bool hostile = random.chance(30);
        for (float& value : noise_) value = static_cast<float>(hostile ? random.value() : random.normal());
        device_seed_[0] = static_cast<int64_t>(seed_);
        device_temperature_[0] = windows_.temperature;
        int64_t bytes = 0;
        EXPECT_CODE(ICSEG_OK, icseg_sample_patches_workspace(&windows_, sizeof(float), k_, 0, &bytes));
        std::vector<float> workspace(bytes / sizeof(float) + 16);
        float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
        indices_.resize(batch_ * k_), scores_.resize(batch_ * k_), coords_.resize(2 * batch_ * k_);
        EXPECT_CODE(ICSEG_OK, icseg_sample_patches_f32(&windows_, maps_.data(), kind_ == given ? noise_.data() : nullptr,
                                                       candidates_, k_, kind_ == seeded, seed_, indices_.data(),
                                                       scores_.data(), coords_.data(), aligned, bytes));
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<int64_t> indices = output<int64_t>(random, batch_ * k_);
        const Array<float> scores = output<float>(random, batch_ * k_);
        const Array<int32_t> coords = output<int32_t>(random, batch_ * k_ * 2);
        const icseg_cuda_windows windows = {
            batch_, height_, width_, windows_.stride_batch, windows_.stride_y, windows_.stride_x, windows_.patch,
            windows_.stride, windows_.before, windows_.after, static_cast<const float*>(windows_.taps), taps_,
            on_device_ ? device_temperature_.data() : nullptr, on_device_ ? 0 : windows_.temperature};
        CHECK(icseg_cuda_sample_patches_f32(&windows, maps_.data(), kind_ == given ? noise_.data() : nullptr,
                                            candidates_, on_device_ ? device_seed_.data() : nullptr, k_,
                                            kind_ == seeded, on_device_ ? 0 : seed_, indices.data(), scores.data(),
                                            coords.data(), nullptr) == ICSEG_CUDA_OK);
        expect_equal("indices", indices, indices_);
        expect_equal("coords", coords, coords_);
        for (int64_t n = 0; n < scores.count(); ++n)  // but for the sign of a zero
            if (scores[n] != scores_[n]) fail("scores[%lld] is %.9g, expected %.9g", (long long)n, scores[n], scores_[n]);
        Digest digest;
        digest.add(indices);
        digest.add(scores);
        return digest.value();
    }

private:
    enum Noise { none, given, seeded };

    int64_t batch_, height_, width_, taps_;
    Array<float> kernel_;
    Strided<float> maps_;
    Noise kind_;
    uint64_t seed_;
    Array<int64_t> device_seed_;
    Array<double> device_temperature_;
    bool on_device_;
    icseg_windows windows_;
    int64_t rows_, columns_, candidates_, k_;
    std::vector<float> noise_, scores_;
    std::vector<int64_t> indices_;
    std::vector<int32_t> coords_;
};

void errors() {
    icseg_cuda_windows fine = {};
    fine.batch = 0, fine.height = 8, fine.width = 9, fine.patch = 3, fine.stride = 1, fine.tap_count = 1;
    const auto code = [](const icseg_cuda_windows& windows, int64_t k) {
        return icseg_cuda_sample_patches_f32(&windows, nullptr, nullptr, 0, nullptr, k, 0, 0, nullptr, nullptr, nullptr,
                                             nullptr);
    };
    CHECK(code(fine, 42) == ICSEG_CUDA_OK);
    CHECK(code(fine, 43) == ICSEG_CUDA_DRAWS);
    CHECK(code(fine, -1) == ICSEG_CUDA_NEGATIVE_SIZE);
    using W = icseg_cuda_windows;
    const auto expect = [&](int expected, int64_t W::*field, int64_t value) {
        W changed = fine;
        changed.*field = value;
        CHECK(code(changed, 0) == expected);
    };
    for (int64_t W::*field :
         {&W::batch, &W::height, &W::width, &W::patch, &W::stride, &W::before, &W::after, &W::tap_count}) {
        expect(ICSEG_CUDA_NEGATIVE_SIZE, field, -1);
        expect(ICSEG_CUDA_NEGATIVE_SIZE, field, INT64_MIN);
        expect(ICSEG_CUDA_TOO_LARGE, field, INT64_MAX);
    }
    for (int64_t W::*field : {&W::height, &W::width, &W::patch, &W::stride, &W::tap_count})
        expect(ICSEG_CUDA_WINDOWS, field, 0);
    expect(ICSEG_CUDA_WINDOWS, &W::patch, 9);
    expect(ICSEG_CUDA_WINDOWS, &W::tap_count, 2);
    expect(ICSEG_CUDA_TOO_LARGE, &W::tap_count, ICSEG_CUDA_MOST_TAPS + 2);
    expect(ICSEG_CUDA_OK, &W::height, ICSEG_CUDA_MOST_PIXELS / 9);
    expect(ICSEG_CUDA_TOO_LARGE, &W::height, ICSEG_CUDA_MOST_PIXELS / 9 + 1);
}

std::unique_ptr<Case> make(Random& random, bool large) { return std::make_unique<Windows>(random, large); }

const Test test("cuda_sample_patches", make, errors);

}  // namespace
