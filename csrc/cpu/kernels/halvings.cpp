// halvings: bands of an image, each through several halvings while it is in the cache.
#include "halvings.h"

#include "../parallel.h"
#include "simd.h"

namespace icseg {
namespace ICSEG_ISA {
namespace {

// A band of 2^kTogether rows goes through as many halvings before the next one.
constexpr int64_t kTogether = 5;

constexpr float kLeastVariance = 1e-12f;

// Pixels of two rows, side by side: one each, or vectors of them.
template <typename Number>
struct Square {
    Number upper_left, lower_left, upper_right, lower_right;

    Number mean() const { return ((upper_left + lower_left) + (upper_right + lower_right)) * 0.25f; }
    Square squared() const {
        return {upper_left * upper_left, lower_left * lower_left, upper_right * upper_right, lower_right * lower_right};
    }
};

// Two rows that become one. Past the last row, `lower` is the upper one again.
struct Rows {
    const float* upper;
    const float* lower;

    // Those that become the pixels from x on.
    Square<Vector<float>> vectors(int64_t x) const {
        Square<Vector<float>> found;
        const float *above = upper + 2 * x, *below = lower + 2 * x;
        deinterleave<float>(load(above), load(above + kLanes<float>), found.upper_left, found.upper_right);
        deinterleave<float>(load(below), load(below + kLanes<float>), found.lower_left, found.lower_right);
        return found;
    }
    // Past the last column, `right` is the left one again.
    Square<float> pixels(int64_t left, int64_t right) const {
        return {upper[left], lower[left], upper[right], lower[right]};
    }
};

template <typename Number>
inline Number deviation(Number mean, Number mean_of_squares) {
    return square_root(larger(mean_of_squares - mean * mean, Number{} + kLeastVariance));
}

// Where the means of squares come from, if they are wanted.
enum class Squares { none, of_values, given };

// A row of `width` pixels to half as many. squares_to may be null, or not read later.
template <Squares kSquares>
inline void halve_row(const Rows& values, const Rows& squares, int64_t width, float* mean_to, float* squares_to,
                      float* deviation_to) {
    const int64_t pairs = width / 2;
    int64_t x = 0;
    for (; x + kLanes<float> <= pairs; x += kLanes<float>) {
        const Square<Vector<float>> found = values.vectors(x);
        const Vector<float> mean = found.mean();
        store(mean_to + x, mean);
        if constexpr (kSquares != Squares::none) {
            const Vector<float> square =
                (kSquares == Squares::given ? squares.vectors(x) : found.squared()).mean();
            if (squares_to) store(squares_to + x, square);
            store(deviation_to + x, deviation(mean, square));
        }
    }
    for (; 2 * x < width; ++x) {
        const int64_t left = 2 * x, right = smaller(left + 1, width - 1);
        const Square<float> found = values.pixels(left, right);
        const float mean = mean_to[x] = found.mean();
        if constexpr (kSquares != Squares::none) {
            const float square = (kSquares == Squares::given ? squares.pixels(left, right) : found.squared()).mean();
            if (squares_to) squares_to[x] = square;
            deviation_to[x] = deviation(mean, square);
        }
    }
}

// A halving: what it reads, and where its rows go.
struct Step {
    int64_t height, width;  // of what it reads
    int64_t pitch;          // of the values that it reads
    const float* values;
    const float* squares;  // means of squares that it reads, or null: those of the values
    float* mean;
    float* deviation;  // null: not wanted
    float* squares_to;  // null: not wanted

    void row(int64_t y) const {
        const int64_t upper = 2 * y, lower = smaller(upper + 1, height - 1), to = y * half(width);
        const Rows rows{values + upper * pitch, values + lower * pitch};
        if (!deviation) return halve_row<Squares::none>(rows, rows, width, mean + to, nullptr, nullptr);
        float* const kept = squares_to ? squares_to + to : nullptr;
        if (!squares) return halve_row<Squares::of_values>(rows, rows, width, mean + to, kept, deviation + to);
        const Rows given{squares + upper * width, squares + lower * width};
        halve_row<Squares::given>(rows, given, width, mean + to, kept, deviation + to);
    }
};

}  // namespace

void halvings(const Halvings& call) {
    int64_t height = call.height, width = call.width;
    float* squares = call.squares;         // of this round's first halving
    const float* earlier = nullptr;        // those of the last one before
    for (int64_t first = 0; first < call.count; first += kTogether) {
        const int64_t together = smaller(kTogether, call.count - first);
        const int64_t bands = height / (int64_t{1} << together) + (height % (int64_t{1} << together) > 0);
        const int64_t traffic = 2 * call.planes * height * width * static_cast<int64_t>(sizeof(float));
        parallel_for(call.planes * bands, traffic, [&](int64_t i) {
            const int64_t plane = i / bands, band = i % bands;
            Step step{height, width, width, nullptr, nullptr, nullptr, nullptr, nullptr};
            if (first == 0) {
                step.pitch = call.stride_y;
                step.values = call.image + plane / call.channels * call.stride_image +
                              plane % call.channels * call.stride_channel;
            } else {
                step.values = call.means[first - 1] + plane * height * width;
                if (earlier) step.squares = earlier + plane * height * width;
            }
            float* next_squares = squares;
            for (int64_t n = 0; n < together; ++n) {
                const int64_t level = first + n, rows = half(step.height), elements = rows * half(step.width);
                const int64_t share = int64_t{1} << (together - 1 - n);  // rows of a band
                step.mean = call.means[level] + plane * elements;
                step.deviation = level < call.deviating ? call.deviations[level] + plane * elements : nullptr;
                step.squares_to = level + 1 < call.deviating ? next_squares + plane * elements : nullptr;
                for (int64_t y = band * share; y < smaller((band + 1) * share, rows); ++y) step.row(y);
                step.values = step.mean, step.squares = step.squares_to;
                step.height = rows, step.pitch = step.width = half(step.width);
                next_squares += call.planes * elements;
            }
        });
        for (int64_t n = 0; n < together; ++n) {
            height = half(height), width = half(width);
            earlier = first + n + 1 < call.deviating ? squares : nullptr;
            if (earlier) squares += call.planes * height * width;
        }
    }
}

}  // namespace ICSEG_ISA
}  // namespace icseg
