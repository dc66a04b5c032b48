// icseg_halvings: each pixel from the four before it, in the order of the contract.
#include "testing.h"

#include <algorithm>

namespace {

using namespace testing;

int64_t half(int64_t length) { return length / 2 + length % 2; }

// [planes, height, width] to half its size.
std::vector<float> halved(const std::vector<float>& values, int64_t planes, int64_t height, int64_t width) {
    std::vector<float> found;
    for (int64_t n = 0; n < planes; ++n)
        for (int64_t y = 0; y < height; y += 2)
            for (int64_t x = 0; x < width; x += 2) {
                const auto at = [&](int64_t row, int64_t column) {
                    return values[(n * height + std::min(row, height - 1)) * width + std::min(column, width - 1)];
                };
                const float left = at(y, x) + at(y + 1, x), right = at(y, x + 1) + at(y + 1, x + 1);
                found.push_back((left + right) * 0.25f);
            }
    return found;
}

class Halvings : public Case {
public:
    Halvings(Random& random, bool large)
        : images_(large ? 2 : random.size(3)),
          channels_(large ? 2 : random.size(3)),
          height_(large ? 210 : random.size(70)),
          width_(large ? 301 : random.size(70)),
          count_(random.integer(0, 8)),
          deviating_(random.integer(0, count_)),
          image_(random, {images_, channels_, height_, width_}, true) {
        image_.fill(random, random.chance(20));
        std::vector<float> mean, square;
        image_.each([&](float element) { mean.push_back(element), square.push_back(element * element); });
        int64_t height = height_, width = width_;
        for (int64_t i = 0; i < count_; ++i) {
            mean = halved(mean, images_ * channels_, height, width);
            square = halved(square, images_ * channels_, height, width);
            height = half(height), width = half(width);
            means_.push_back(mean);
            if (i >= deviating_) continue;
            std::vector<double> deviation;
            for (size_t j = 0; j < mean.size(); ++j) {
                const float variance = square[j] - mean[j] * mean[j];
                deviation.push_back(std::sqrt(variance < 1e-12f ? 1e-12f : variance));
            }
            deviations_.push_back(deviation);
            if (i + 1 < deviating_) squares_ += mean.size();
        }
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        std::vector<Array<float>> means, deviations;
        std::vector<float*> to_means, to_deviations;
        for (const auto& mean : means_) means.push_back(output<float>(random, mean.size()));
        for (const auto& deviation : deviations_) deviations.push_back(output<float>(random, deviation.size()));
        for (const auto& array : means) to_means.push_back(array.data());
        for (const auto& array : deviations) to_deviations.push_back(array.data());
        const Array<float> workspace = output<float>(random, squares_);
        const auto halve = [&](int64_t bytes) {
            return icseg_halvings_f32(image_.data(), to_means.data(), to_deviations.data(), images_, channels_, height_,
                                      width_, count_, deviating_, image_.strides[0], image_.strides[1],
                                      image_.strides[2], workspace.data(), bytes);
        };
        if (squares_ > 0) EXPECT_CODE(ICSEG_WORKSPACE, halve(4 * squares_ - 1));
        EXPECT_CODE(ICSEG_OK, halve(4 * squares_));
        Digest digest;
        for (size_t i = 0; i < means.size(); ++i) {
            const std::vector<double> wide(means_[i].begin(), means_[i].end());
            expect_close("mean", means[i], wide, {0});
            digest.add(means[i]);
        }
        for (size_t i = 0; i < deviations.size(); ++i) {
            expect_close("deviation", deviations[i], deviations_[i], {0});
            digest.add(deviations[i]);
        }
        return digest.value();
    }

private:
    int64_t images_, channels_, height_, width_, count_, deviating_, squares_ = 0;
    Strided<float> image_;
    std::vector<std::vector<float>> means_;
    std::vector<std::vector<double>> deviations_;
};

void errors() {
    const auto code = [](int64_t images, int64_t channels, int64_t height, int64_t width, int64_t count,
                         int64_t deviating, int64_t bytes) {
        return icseg_halvings_f32(nullptr, nullptr, nullptr, images, channels, height, width, count, deviating, 0, 0, 0,
                                  nullptr, bytes);
    };
    const int64_t huge = int64_t(1) << 62;
    EXPECT_CODE(ICSEG_NEGATIVE_SIZE, code(-1, 1, 4, 4, 1, 0, 0));
    EXPECT_CODE(ICSEG_NEGATIVE_SIZE, code(1, 1, INT64_MIN, 4, 1, 0, 0));
    EXPECT_CODE(ICSEG_NEGATIVE_SIZE, code(1, 1, 4, 4, 1, -1, 0));
    EXPECT_CODE(ICSEG_HALVINGS, code(1, 1, 4, 4, 1, 2, 0));
    EXPECT_CODE(ICSEG_TOO_LARGE, code(1, 1, huge, 4, 1, 0, 0));
    EXPECT_CODE(ICSEG_TOO_LARGE, code(huge, 4, 4, 4, 1, 0, 0));
    EXPECT_CODE(ICSEG_TOO_LARGE, code(0, 4, INT64_MAX, INT64_MAX, 1, 0, 0));
    EXPECT_CODE(ICSEG_WORKSPACE, code(1, 1, 4, 4, 2, 2, 15));
    EXPECT_CODE(ICSEG_WORKSPACE, code(1, 1, 4, 4, 2, 2, -1));
    EXPECT_CODE(ICSEG_OK, code(0, 1, 4, 4, INT64_MAX, INT64_MAX, 0));
    EXPECT_CODE(ICSEG_OK, code(1, 1, 4, 4, 0, 0, 0));
}

std::unique_ptr<Case> make(Random& random, bool large) { return std::make_unique<Halvings>(random, large); }

const Test test("halvings", make, errors);

}  // namespace
