// icseg_small_convolutions: layers and pixels one after the other, in double.
#include "testing.h"

#include <algorithm>

namespace {

using namespace testing;

int64_t output_side(int64_t side, const icseg_convolution& layer) {
    return (side + 2 * layer.padding - layer.kernel) / layer.stride + 1;
}

struct Values {
    int64_t channels, height, width;
    std::vector<double> data;  // [images, channels, height, width]

    // Of zeros or the nearest pixel beyond the border.
    double at(int64_t n, int64_t c, int64_t y, int64_t x, bool replicate) const {
        if (!replicate && (y < 0 || x < 0 || y >= height || x >= width)) return 0;
        y = std::clamp<int64_t>(y, 0, height - 1), x = std::clamp<int64_t>(x, 0, width - 1);
        return data[((n * channels + c) * height + y) * width + x];
    }
};

class Stack : public Case {
public:
    Stack(Random& random, bool large)
        : images_(large ? 24 : random.size(4)),
          height_(large ? 16 : random.integer(1, random.chance(10) ? 32 : 11)),
          width_(large ? 16 : random.integer(1, random.chance(10) ? 32 : 17)),
          x_(random, {images_, random.integer(1, random.chance(10) ? 40 : 9), height_, width_}) {
        x_.fill(random, false);
        values_ = {x_.sizes[1], height_, width_, {}};
        x_.each([&](float& element) { values_.data.push_back(element); });
        const int64_t count = random.integer(1, 4);
        int64_t height = height_, width = width_;
        for (int64_t i = 0; i < count; ++i) {
            icseg_convolution layer{};
            layer.in_channels = values_.channels;
            layer.out_channels = random.pick<int64_t>({1, 2, 4, 7, 8, 12, 16, 17, 20, 24, 33, 40, 49});
            do {
                layer.kernel = random.integer(1, 5);
                layer.padding = random.integer(0, layer.kernel - 1);
            } while (std::min(height, width) + 2 * layer.padding < layer.kernel);
            layer.stride = random.integer(1, 2);
            if (std::max(output_side(height, layer), output_side(width, layer)) > 32) layer.padding = 0;
            layer.replicate = random.chance(50);
            layer.slope = random.pick({1.0, 0.01, 0.0, -0.5});
            weights_.push_back(normals<float>(random, layer.out_channels * layer.in_channels * layer.kernel * layer.kernel));
            const double scale = 1 / std::sqrt(double(layer.in_channels * layer.kernel * layer.kernel));
            for (int64_t j = 0; j < weights_.back().count(); ++j) weights_.back()[j] *= float(scale);
            biases_.push_back(normals<float>(random, layer.out_channels));
            layer.weight = weights_.back().data();
            layer.bias = random.chance(70) ? biases_.back().data() : nullptr;
            layers_.push_back(layer);
            height = output_side(height, layer), width = output_side(width, layer);
            follow(layer, height, width);
        }
        most_ = 1;
        for (const double value : values_.data) most_ = std::max(most_, std::fabs(value));
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        int64_t bytes = -1;
        const int64_t count = layers_.size(), slots = random.integer(1, 4);
        EXPECT_CODE(ICSEG_OK,
                    icseg_small_convolutions_workspace(layers_.data(), count, height_, width_, slots, &bytes));
        CHECK(bytes > 0);
        const Array<unsigned char> workspace = output<unsigned char>(random, bytes);
        const Array<float> out = output<float>(random, values_.data.size());
        const auto convolve = [&](int64_t given) {
            return icseg_small_convolutions_f32(x_.data(), layers_.data(), count, out.data(), images_, height_, width_,
                                                x_.strides[0], x_.strides[1], x_.strides[2], x_.strides[3], slots,
                                                workspace.data(), given);
        };
        EXPECT_CODE(ICSEG_WORKSPACE, convolve(bytes - 1));
        EXPECT_CODE(ICSEG_OK, convolve(bytes));
        if (switching()) return 0;
        expect_close("out", out, values_.data, {3e-5 * most_});
        Digest digest;
        digest.add(out);
        return digest.value();
    }

private:
    void follow(const icseg_convolution& layer, int64_t height, int64_t width) {
        Values next{layer.out_channels, height, width, {}};
        const int64_t k = layer.kernel;
        for (int64_t n = 0; n < images_; ++n)
            for (int64_t o = 0; o < layer.out_channels; ++o)
                for (int64_t y = 0; y < height; ++y)
                    for (int64_t x = 0; x < width; ++x) {
                        double sum = layer.bias ? biases_.back()[o] : 0;
                        for (int64_t c = 0; c < layer.in_channels; ++c)
                            for (int64_t i = 0; i < k * k; ++i)
                                sum += weights_.back()[(o * layer.in_channels + c) * k * k + i] *
                                       values_.at(n, c, y * layer.stride + i / k - layer.padding,
                                                  x * layer.stride + i % k - layer.padding, layer.replicate);
                        next.data.push_back(sum > 0 ? sum : sum * layer.slope);
                    }
        values_ = std::move(next);
    }

    int64_t images_, height_, width_;
    Strided<float> x_;
    std::vector<icseg_convolution> layers_;
    std::vector<Array<float>> weights_, biases_;
    Values values_;
    double most_;
};

void errors() {
    const int64_t huge = int64_t(1) << 62;
    const icseg_convolution good{nullptr, nullptr, 3, 4, 3, 1, 1, 0, 1.0};
    struct Call {
        int64_t images = 0, height = 8, width = 8, slots = 1, bytes = int64_t(1) << 30, count = 1;
    };
    const auto code = [](const Call& call, const icseg_convolution& layer, int64_t* bytes) {
        const std::vector<icseg_convolution> layers(std::max<int64_t>(std::min<int64_t>(call.count, 20), 1), layer);
        const int of_workspace = icseg_small_convolutions_workspace(layers.data(), call.count, call.height, call.width,
                                                                    call.slots, bytes);
        const int found = icseg_small_convolutions_f32(nullptr, layers.data(), call.count, nullptr, call.images,
                                                       call.height, call.width, 0, 0, 0, 0, call.slots, nullptr,
                                                       call.bytes);
        CHECK(of_workspace == ICSEG_OK || of_workspace == found);
        return found;
    };
    const auto with = [](const icseg_convolution& layer, int64_t icseg_convolution::*field, int64_t value) {
        icseg_convolution changed = layer;
        changed.*field = value;
        return changed;
    };
    int64_t bytes = -1;
    for (const int64_t count : {int64_t(-1), int64_t(0), int64_t(17), INT64_MIN, INT64_MAX}) {
        Call call;
        call.count = count;
        EXPECT_CODE(ICSEG_LAYERS, code(call, good, &bytes));
    }
    for (const int64_t side : {int64_t(-1), int64_t(0), int64_t(33), huge, INT64_MIN}) {
        Call call;
        call.height = side;
        EXPECT_CODE(ICSEG_LAYERS, code(call, good, &bytes));
        call.height = 8, call.width = side;
        EXPECT_CODE(ICSEG_LAYERS, code(call, good, &bytes));
    }
    struct Row {
        int64_t icseg_convolution::*field;
        std::vector<int64_t> values;
    };
    const std::vector<Row> rows{
        {&icseg_convolution::in_channels, {-1, 0, 129, huge}},
        {&icseg_convolution::out_channels, {-1, 0, 129, INT64_MAX}},
        {&icseg_convolution::kernel, {-1, 0, 1, 6, huge}},  // the padding is 1
        {&icseg_convolution::stride, {-1, 0, 3, INT64_MIN}},
        {&icseg_convolution::padding, {-1, 3, huge, INT64_MAX}},
    };
    for (const Row& row : rows)
        for (const int64_t value : row.values)
            EXPECT_CODE(ICSEG_LAYERS, code(Call{}, with(good, row.field, value), &bytes));
    Call call;
    call.count = 2;  // 3 channels to 4, and again
    EXPECT_CODE(ICSEG_LAYERS, code(call, good, &bytes));
    call.count = 1, call.height = call.width = 1;
    EXPECT_CODE(ICSEG_LAYERS, code(call, with(good, &icseg_convolution::padding, 0), &bytes));
    call.height = call.width = 32;  // 5 x 5 with a padding of 4: 36 x 36
    EXPECT_CODE(ICSEG_LAYERS, code(call, {nullptr, nullptr, 3, 4, 5, 1, 4, 0, 1.0}, &bytes));
    call = Call{};
    call.images = -1;
    EXPECT_CODE(ICSEG_NEGATIVE_SIZE, code(call, good, &bytes));
    call.images = huge;
    EXPECT_CODE(ICSEG_TOO_LARGE, code(call, good, &bytes));
    call.images = 0;
    for (const int64_t slots : {int64_t(0), int64_t(-1), huge}) {
        call.slots = slots;
        EXPECT_CODE(ICSEG_TOO_LARGE, code(call, good, &bytes));
    }
    call.slots = 1, call.bytes = 0;
    EXPECT_CODE(ICSEG_WORKSPACE, code(call, good, &bytes));
    call.bytes = bytes;
    EXPECT_CODE(ICSEG_OK, code(call, good, &bytes));
}

std::unique_ptr<Case> make(Random& random, bool large) { return std::make_unique<Stack>(random, large); }

const Test test("small_convolutions", make, errors);

}  // namespace
