// icseg_upsample_with_patches: pixels by their distance to the four nearest, then patch by patch.
#include "testing.h"

#include <algorithm>

namespace {

using namespace testing;

class Upsampling : public Case {
public:
    Upsampling(Random& random, bool large)
        : batch_(large ? 2 : random.size(3)),
          channels_(large ? 2 : random.size(3)),
          height_(large ? 233 : random.size(90)),
          width_(large ? 310 : random.size(90)),
          count_(large ? 40 : random.size(9)),
          patch_height_(random.integer(1, 20)),
          patch_width_(random.integer(1, 40)),
          coarser_(random, {batch_, channels_, (height_ + 1) / 2, (width_ + 1) / 2}, true),
          patches_(normals<float>(random, batch_ * count_ * channels_ * patch_height_ * patch_width_, true)),
          coords_(random, 2 * batch_ * count_) {
        coarser_.fill(random, false);
        for (int64_t i = 0; i < coords_.count(); ++i)
            coords_[i] = i % 2 ? random.coordinate(width_, patch_width_ + 1)
                               : random.coordinate(height_, patch_height_ + 1);
        for (int64_t b = 0; b < batch_; ++b)
            for (int64_t c = 0; c < channels_; ++c) plane(b, c);
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        const Array<float> out = output<float>(random, expected_.size());
        EXPECT_CODE(ICSEG_OK, icseg_upsample_with_patches_f32(
                                  coarser_.data(), patches_.data(), coords_.data(), out.data(), batch_, channels_,
                                  coarser_.sizes[2], coarser_.sizes[3], height_, width_, count_, patch_height_,
                                  patch_width_, coarser_.strides[0], coarser_.strides[1], coarser_.strides[2]));
        if (switching()) return 0;
        expect_close("out", out, expected_, bounds_);
        Digest digest;
        digest.add(out);
        return digest.value();
    }

private:
    void plane(int64_t b, int64_t c) {
        const size_t first = expected_.size();
        const auto place = [](int64_t i, int64_t length) {  // the nearer and the other pixel
            const int64_t near = i / 2, far = i % 2 ? std::min(near + 1, length - 1) : std::max<int64_t>(near - 1, 0);
            return std::pair<int64_t, int64_t>(near, far);
        };
        for (int64_t y = 0; y < height_; ++y)
            for (int64_t x = 0; x < width_; ++x) {
                const auto [row, other_row] = place(y, coarser_.sizes[2]);
                const auto [column, other_column] = place(x, coarser_.sizes[3]);
                const auto across = [&](int64_t r) {
                    return 0.75 * coarser_.at({b, c, r, column}) + 0.25 * coarser_.at({b, c, r, other_column});
                };
                expected_.push_back(0.75 * across(row) + 0.25 * across(other_row));
                bounds_.push_back(1e-5);
            }
        for (int64_t k = 0; k < count_; ++k)
            for (int64_t i = 0; i < patch_height_; ++i)
                for (int64_t j = 0; j < patch_width_; ++j) {
                    const int64_t corner = 2 * (b * count_ + k);
                    const __int128 y = __int128(coords_[corner]) + i, x = __int128(coords_[corner + 1]) + j;
                    if (y < 0 || y >= height_ || x < 0 || x >= width_) continue;
                    const size_t at = first + static_cast<size_t>(y * width_ + x);
                    const int64_t from = ((b * count_ + k) * channels_ + c) * patch_height_ + i;
                    expected_[at] = patches_[from * patch_width_ + j], bounds_[at] = 0;
                }
    }

    int64_t batch_, channels_, height_, width_, count_, patch_height_, patch_width_;
    Strided<float> coarser_;
    Array<float> patches_;
    Array<int64_t> coords_;
    std::vector<double> expected_, bounds_;
};

void errors() {
    struct Call {
        int64_t batch = 1, channels = 1, coarse_height = 4, coarse_width = 4, height = 8, width = 7, count = 2;
        int64_t patch_height = 3, patch_width = 5;
    };
    const auto code = [](int64_t Call::*field, int64_t value, Call call = {}) {
        call.*field = value;
        return icseg_upsample_with_patches_f32(nullptr, nullptr, nullptr, nullptr, call.batch, call.channels,
                                               call.coarse_height, call.coarse_width, call.height, call.width,
                                               call.count, call.patch_height, call.patch_width, 0, 0, 0);
    };
    const int64_t huge = int64_t(1) << 62;
    for (int64_t Call::*field : {&Call::batch, &Call::channels, &Call::coarse_height, &Call::coarse_width,
                                 &Call::height, &Call::width, &Call::count}) {
        EXPECT_CODE(ICSEG_NEGATIVE_SIZE, code(field, -1));
        EXPECT_CODE(ICSEG_NEGATIVE_SIZE, code(field, INT64_MIN));
    }
    for (int64_t Call::*field : {&Call::patch_height, &Call::patch_width}) {
        EXPECT_CODE(ICSEG_PATCH_SIZE, code(field, 0));
        EXPECT_CODE(ICSEG_PATCH_SIZE, code(field, INT64_MIN));
        EXPECT_CODE(ICSEG_TOO_LARGE, code(field, huge));
    }
    for (int64_t Call::*field : {&Call::coarse_height, &Call::coarse_width, &Call::height, &Call::width})
        for (const int64_t side : {int64_t(0), int64_t(3), int64_t(5), int64_t(6), int64_t(9), huge, INT64_MAX})
            EXPECT_CODE(ICSEG_DOUBLE, code(field, side));
    for (int64_t Call::*field : {&Call::batch, &Call::channels, &Call::count})
        EXPECT_CODE(ICSEG_TOO_LARGE, code(field, huge));
    for (int64_t Call::*field : {&Call::batch, &Call::channels}) EXPECT_CODE(ICSEG_OK, code(field, 0));
}

std::unique_ptr<Case> make(Random& random, bool large) { return std::make_unique<Upsampling>(random, large); }

const Test test("upsample_with_patches", make, errors);

}  // namespace
