// icseg_sample_patches: its logits by plain loops, their gradient by differences, and a draw from those logits.
#include "testing.h"

#include <algorithm>

namespace {

using namespace testing;

int backward_of(const icseg_windows* w, const float* maps, const float* grad, float* out, float* workspace, int64_t bytes) {
    return icseg_window_logits_backward_f32(w, maps, grad, out, workspace, bytes);
}
int backward_of(const icseg_windows* w, const double* maps, const double* grad, double* out, double* workspace,
                int64_t bytes) {
    return icseg_window_logits_backward_f64(w, maps, grad, out, workspace, bytes);
}
int draw_of(const icseg_windows* w, const float* maps, const float* noise, int64_t stride, int64_t k, bool seeded,
            uint64_t seed, int64_t* indices, float* scores, int32_t* coords, float* workspace, int64_t bytes) {
    return icseg_sample_patches_f32(w, maps, noise, stride, k, seeded, seed, indices, scores, coords, workspace, bytes);
}
int draw_of(const icseg_windows* w, const double* maps, const double* noise, int64_t stride, int64_t k, bool seeded,
            uint64_t seed, int64_t* indices, double* scores, int32_t* coords, double* workspace, int64_t bytes) {
    return icseg_sample_patches_f64(w, maps, noise, stride, k, seeded, seed, indices, scores, coords, workspace, bytes);
}

// A workspace that is aligned to 64 bytes and promises as many bytes as asked for.
struct alignas(64) Line {
    char bytes[64];
};

template <typename Real>
class Windows : public Case {
public:
    Windows(Random& random, bool large)
        : batch_(large ? 2 : random.size(3)),
          height_(large ? 150 : random.integer(1, 24)),
          width_(large ? 170 : random.integer(1, 40)),
          taps_(1 + 2 * (random.chance(50) ? random.integer(0, large ? 3 : 30) : 0)),
          kernel_(random, taps_),
          maps_(random, {batch_, height_, width_}),
          seed_(random.bits()) {
        windows_ = {};
        windows_.batch = batch_, windows_.height = height_, windows_.width = width_;
        windows_.before = random.integer(0, 5), windows_.after = random.integer(0, 5);
        const int64_t padding = windows_.before + windows_.after;
        windows_.patch = random.integer(1, std::min(std::min(height_, width_) + padding, large ? int64_t(20) : int64_t(60)));
        windows_.stride = random.chance(40) ? 1 : random.integer(1, 9);
        windows_.tap_count = taps_;
        windows_.taps = taps_ == 1 ? nullptr : kernel_.data();
        windows_.temperature = random.pick({1.0, 0.1, 7.5});
        double sum = 0;
        for (int64_t i = 0; i < taps_; ++i) sum += kernel_[i] = static_cast<Real>(0.05 + random.uniform());
        for (int64_t i = 0; i < taps_; ++i) kernel_[i] = static_cast<Real>(kernel_[i] / sum);
        hostile_ = random.chance(30);
        maps_.fill(random, false);
        constant_ = random.chance(10);
        if (constant_) maps_.each([](Real& pixel) { pixel = Real(0.25); });
        if (hostile_)
            maps_.each([&](Real& pixel) {
                if (random.chance(10)) pixel = static_cast<Real>(random.pick<double>({NAN, INFINITY, -INFINITY}));
            });
        windows_.stride_batch = maps_.strides[0];
        windows_.stride_y = maps_.strides[1], windows_.stride_x = maps_.strides[2];
        rows_ = (height_ + padding - windows_.patch) / windows_.stride + 1;
        columns_ = (width_ + padding - windows_.patch) / windows_.stride + 1;
        k_ = random.chance(10) ? rows_ * columns_ : random.integer(0, std::min<int64_t>(rows_ * columns_, large ? 600 : 12));
        for (int64_t b = 0; b < batch_; ++b) {
            const std::vector<double> logits = logits_by_loops(b);
            expected_.insert(expected_.end(), logits.begin(), logits.end());
        }
        grad_.resize(expected_.size());
        for (double& value : grad_) value = random.normal();
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        icseg_windows windows = windows_;
        windows.threads = random.integer(1, 4);
        const int64_t candidates = rows_ * columns_;
        Digest digest;

        // All windows, drawn without noise: the scores are the logits.
        const Array<Real> logits = output<Real>(random, batch_ * candidates);
        const Array<Real> sorted = output<Real>(random, batch_ * candidates);
        const Array<int64_t> places = output<int64_t>(random, batch_ * candidates);
        const Array<int32_t> corners = output<int32_t>(random, batch_ * candidates * 2);
        with_workspace(random, windows, candidates, 0, [&](Real* workspace, int64_t bytes) {
            return draw_of(&windows, maps_.data(), nullptr, 0, candidates, false, 0, places.data(), sorted.data(),
                           corners.data(), workspace, bytes);
        });
        for (int64_t n = 0; n < batch_ * candidates; ++n) {
            CHECK(places[n] >= 0 && places[n] < candidates);
            logits[n / candidates * candidates + places[n]] = sorted[n];
        }
        expect_close("logits", logits, expected_, {(sizeof(Real) == 4 ? 2e-5 : 1e-12) / windows.temperature});
        digest.add(logits);

        // The draw is that of gumbel_topk from the same bits.
        const bool seeded = seed_ % 2;
        const Array<int64_t> indices = output<int64_t>(random, batch_ * k_);
        const Array<Real> scores = output<Real>(random, batch_ * k_);
        const Array<int32_t> coords = output<int32_t>(random, batch_ * k_ * 2);
        with_workspace(random, windows, k_, 0, [&](Real* workspace, int64_t bytes) {
            return draw_of(&windows, maps_.data(), nullptr, 0, k_, seeded, seed_, indices.data(), scores.data(),
                           coords.data(), workspace, bytes);
        });
        std::vector<float> noise(batch_ * candidates);
        CHECK(icseg_gumbel_noise(noise.data(), batch_, candidates, seed_, 0, 0) == ICSEG_OK);
        for (int64_t b = 0; b < batch_; ++b) {
            std::vector<Real> score(candidates);
            std::vector<int64_t> order(candidates);
            for (int64_t i = 0; i < candidates; ++i) {
                order[i] = i;
                score[i] = logits[b * candidates + i] + (seeded ? Real(noise[b * candidates + i]) : Real(0));
            }
            std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return score[i] > score[j]; });
            for (int64_t i = 0; i < k_; ++i) {
                const int64_t n = b * k_ + i;
                CHECK(indices[n] == order[i]);
                CHECK(scores[n] == score[order[i]]);
                CHECK(coords[2 * n] == order[i] / columns_ * windows.stride - windows.before);
                CHECK(coords[2 * n + 1] == order[i] % columns_ * windows.stride - windows.before);
            }
        }
        digest.add(indices);
        digest.add(scores);

        const Array<Real> grad_logits = output<Real>(random, batch_ * candidates);
        for (int64_t i = 0; i < grad_logits.count(); ++i) grad_logits[i] = static_cast<Real>(grad_[i]);
        const Array<Real> grad_maps = output<Real>(random, batch_ * height_ * width_);
        with_workspace(random, windows, 0, 1, [&](Real* workspace, int64_t bytes) {
            return backward_of(&windows, maps_.data(), grad_logits.data(), grad_maps.data(), workspace, bytes);
        });
        if (sizeof(Real) == 8 && !hostile_ && !constant_ && batch_) check_slope(grad_maps);
        digest.add(grad_maps);
        return digest.value();
    }

private:
    template <typename Call>
    void with_workspace(Random& random, const icseg_windows& windows, int64_t k, int64_t backward, const Call& call) const {
        int64_t bytes = -1;
        EXPECT_CODE(ICSEG_OK, icseg_sample_patches_workspace(&windows, sizeof(Real), k, backward, &bytes));
        CHECK(bytes >= 0);
        const Array<Line> workspace = output<Line>(random, (bytes + 63) / 64);
        EXPECT_CODE(ICSEG_OK, call(reinterpret_cast<Real*>(workspace.data()), bytes));
        if (bytes) EXPECT_CODE(ICSEG_WORKSPACE, call(reinterpret_cast<Real*>(workspace.data()), bytes - 1));
    }

    double pixel(int64_t b, int64_t y, int64_t x) const { return maps_.at({b, y, x}); }

    std::vector<double> logits_by_loops(int64_t b, int64_t moved = -1, double by = 0) const {
        double lowest = INFINITY, highest = -INFINITY;
        for (int64_t y = 0; y < height_; ++y)
            for (int64_t x = 0; x < width_; ++x)
                if (std::isfinite(pixel(b, y, x))) {
                    lowest = std::fmin(lowest, pixel(b, y, x));
                    highest = std::fmax(highest, pixel(b, y, x));
                }
        if (lowest > highest) lowest = highest = 0;
        const int64_t before = windows_.before, padding = before + windows_.after, patch = windows_.patch;
        const int64_t rows = height_ + padding - patch + 1, columns = width_ + padding - patch + 1;
        std::vector<double> padded((height_ + padding) * (width_ + padding), 0);
        for (int64_t y = 0; y < height_; ++y)
            for (int64_t x = 0; x < width_; ++x) {
                double value = pixel(b, y, x);
                if (!std::isfinite(value)) value = value > 0 ? highest : lowest;
                if (y * width_ + x == moved) value += by;
                padded[(y + before) * (width_ + padding) + x + before] = value;
            }
        const auto pooled = [&](int64_t height, int64_t width, int64_t down, int64_t along, const std::vector<double>& from) {
            std::vector<double> to;
            for (int64_t y = 0; y + down <= height; ++y)
                for (int64_t x = 0; x + along <= width; ++x) {
                    double most = -INFINITY;
                    for (int64_t i = 0; i < down; ++i)
                        for (int64_t j = 0; j < along; ++j) most = std::fmax(most, from[(y + i) * width + x + j]);
                    to.push_back(most);
                }
            return to;
        };
        std::vector<double> maxima = pooled(height_ + padding, width_ + padding, 1, patch, padded);
        maxima = pooled(height_ + padding, columns, patch, 1, maxima);
        const double least = *std::min_element(maxima.begin(), maxima.end());
        const double most = *std::max_element(maxima.begin(), maxima.end());
        for (double& value : maxima) value = (value - least) / (most - least + 1e-6);
        const auto blurred = [&](const std::vector<double>& from, int64_t dy, int64_t dx) {
            std::vector<double> to(from.size(), 0);
            for (int64_t y = 0; y < rows; ++y)
                for (int64_t x = 0; x < columns; ++x)
                    for (int64_t i = 0; i < taps_; ++i) {
                        const int64_t row = y + dy * (i - taps_ / 2), column = x + dx * (i - taps_ / 2);
                        if (row >= 0 && row < rows && column >= 0 && column < columns)
                            to[y * columns + x] += kernel_[i] * from[row * columns + column];
                    }
            return to;
        };
        if (taps_ > 1) maxima = blurred(blurred(maxima, 1, 0), 0, 1);
        std::vector<double> logits;
        for (int64_t y = 0; y < rows; y += windows_.stride)
            for (int64_t x = 0; x < columns; x += windows_.stride) logits.push_back(maxima[y * columns + x] / windows_.temperature);
        return logits;
    }

    // A few pixels by central differences: the maps' values differ, so small steps change no maximum's place.
    void check_slope(const Array<Real>& grad_maps) const {
        if (maps_.strides[1] == 0 || maps_.strides[2] == 0 || height_ * width_ > 1000) return;
        const int64_t size = rows_ * columns_;
        for (int64_t i = 0; i < 3; ++i) {
            const int64_t b = i % batch_, moved = (i * 7919) % (height_ * width_);
            const double step = 1e-7;
            const std::vector<double> up = logits_by_loops(b, moved, step), down = logits_by_loops(b, moved, -step);
            double slope = 0, scale = 1;
            for (int64_t n = 0; n < size; ++n) {
                slope += grad_[b * size + n] * (up[n] - down[n]) / (2 * step);
                scale += std::fabs(grad_[b * size + n]) / windows_.temperature;
            }
            const double found = grad_maps[(b * height_ + moved / width_) * width_ + moved % width_];
            if (!(std::fabs(found - slope) <= 1e-5 * scale)) fail("gradient %g, expected %g", found, slope);
        }
    }

    int64_t batch_, height_, width_, taps_;
    Array<Real> kernel_;
    Strided<Real> maps_;
    uint64_t seed_;
    icseg_windows windows_;
    bool hostile_, constant_;
    int64_t rows_, columns_, k_;
    std::vector<double> expected_, grad_;
};

void errors() {
    icseg_windows fine = {};
    fine.batch = 1, fine.height = 8, fine.width = 9, fine.patch = 3, fine.stride = 1, fine.tap_count = 1;
    fine.temperature = 1, fine.threads = 1;
    int64_t bytes = 0;
    EXPECT_CODE(ICSEG_OK, icseg_sample_patches_workspace(&fine, 4, 1, 0, &bytes));
    EXPECT_CODE(ICSEG_ELEMENT_BYTES, icseg_sample_patches_workspace(&fine, 2, 1, 0, &bytes));
    EXPECT_CODE(ICSEG_DRAWS, icseg_sample_patches_workspace(&fine, 4, 43, 0, &bytes));
    EXPECT_CODE(ICSEG_OK, icseg_sample_patches_workspace(&fine, 4, 42, 0, &bytes));
    EXPECT_CODE(ICSEG_NEGATIVE_SIZE, icseg_sample_patches_workspace(&fine, 4, -1, 0, &bytes));
    const auto expect = [&](int code, int64_t icseg_windows::*field, int64_t value) {
        icseg_windows changed = fine;
        changed.*field = value;
        EXPECT_CODE(code, icseg_sample_patches_workspace(&changed, 4, 0, 0, &bytes));
        EXPECT_CODE(code, icseg_sample_patches_workspace(&changed, 8, 0, 1, &bytes));
        EXPECT_CODE(code, backward_of(&changed, static_cast<double*>(nullptr), nullptr, nullptr, nullptr, INT64_MAX));
        EXPECT_CODE(code, draw_of(&changed, static_cast<double*>(nullptr), nullptr, 0, 0, false, 0, nullptr, nullptr,
                                  nullptr, nullptr, INT64_MAX));
    };
    using W = icseg_windows;
    for (int64_t W::*field : {&W::batch, &W::height, &W::width, &W::patch, &W::stride, &W::before, &W::after,
                              &W::tap_count, &W::threads}) {
        expect(ICSEG_NEGATIVE_SIZE, field, -1);
        expect(ICSEG_NEGATIVE_SIZE, field, INT64_MIN);
        expect(ICSEG_TOO_LARGE, field, INT64_MAX);
        expect(ICSEG_TOO_LARGE, field, int64_t(1) << 31);
    }
    for (int64_t W::*field : {&W::height, &W::width, &W::patch, &W::stride, &W::tap_count, &W::threads})
        expect(ICSEG_WINDOWS, field, 0);
    expect(ICSEG_WINDOWS, &W::patch, 10);
    expect(ICSEG_WINDOWS, &W::tap_count, 2);
    fine.patch = 1, fine.height = fine.width = fine.before = INT32_MAX;  // 2^32 rows and columns: 2^64 windows
    expect(ICSEG_TOO_LARGE, &W::after, 2);
    EXPECT_CODE(ICSEG_TOO_LARGE, icseg_sample_patches_workspace(&fine, 4, 1, 0, &bytes));
}

std::unique_ptr<Case> make(Random& random, bool large) {
    if (random.chance(50)) return std::make_unique<Windows<float>>(random, large);
    return std::make_unique<Windows<double>>(random, large);
}

const Test test("sample_patches", make, errors);

}  // namespace
