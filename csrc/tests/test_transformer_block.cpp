// icseg_transformer_block: tokens and keys one after the other, in double.
#include "testing.h"

#include <algorithm>

namespace {

using namespace testing;

using Rows = std::vector<std::vector<double>>;

// A linear layer, [outputs, inputs], of values that keep their size.
struct Layer {
    int64_t inputs, outputs;
    Array<float> weight, bias;

    Layer(Random& random, int64_t inputs_given, int64_t outputs_given)
        : inputs(inputs_given), outputs(outputs_given), weight(normals<float>(random, inputs * outputs)),
          bias(normals<float>(random, outputs)) {
        for (int64_t i = 0; i < weight.count(); ++i) weight[i] /= std::sqrt(float(inputs));
    }
    std::vector<double> operator()(const std::vector<double>& x) const {
        std::vector<double> y;
        for (int64_t o = 0; o < outputs; ++o) {
            double sum = bias[o];
            for (int64_t i = 0; i < inputs; ++i) sum += weight[o * inputs + i] * x[i];
            y.push_back(sum);
        }
        return y;
    }
};

struct Norm {
    double eps;
    Array<float> weight, bias;

    Norm(Random& random, int64_t width, double eps_given)
        : eps(eps_given), weight(normals<float>(random, width)), bias(normals<float>(random, width)) {}

    std::vector<double> operator()(std::vector<double> x) const {
        double mean = 0, variance = 0;
        for (const double value : x) mean += value / double(x.size());
        for (const double value : x) variance += (value - mean) * (value - mean) / double(x.size());
        for (size_t i = 0; i < x.size(); ++i) x[i] = (x[i] - mean) / std::sqrt(variance + eps) * weight[i] + bias[i];
        return x;
    }
};

class Block : public Case {
public:
    Block(Random& random, bool large)
        : batch_(random.size(3)), count_(large ? random.integer(40, 80) : random.size(random.chance(20) ? 40 : 7)),
          heads_(random.integer(1, 4)), dim_(heads_ * random.integer(large ? 8 : 1, 20)),
          hidden_(random.integer(1, large ? 100 : 40)), eps_(random.pick({1e-5, 0.1, 1.0})),
          norm_attention_(random, dim_, eps_), norm_mlp_(random, dim_, eps_), query_(random, dim_, dim_),
          key_value_(random, dim_, 2 * dim_), out_(random, dim_, dim_), mlp_in_(random, dim_, hidden_),
          mlp_out_(random, hidden_, dim_), tokens_(random, batch_, count_, dim_) {
        keys_ = count_;
        for (int64_t i = random.integer(0, 3); i > 0; --i) {
            const int64_t some = random.size(large || random.chance(5) ? 400 : 9);
            memory_.emplace_back(random, batch_, some, 2 * dim_);
            keys_ += some;
        }
        listed_ = keys_;
        if (random.chance(50) || keys_ == 0) {
            index_bytes_ = 8;
            listed_ = random.chance(70) ? keys_ : random.size(30);
            index_ = std::make_unique<Array<int64_t>>(random, batch_ * listed_);
            for (int64_t i = 0; i < index_->count(); ++i) {
                (*index_)[i] = random.chance(30) ? -1 : random.chance(70) ? i % listed_ : random.coordinate(keys_, 2);
            }
        }
        for (int64_t b = 0; b < batch_; ++b) follow(b);
        for (const auto* values : {&expected_, &expected_own_})
            for (const double value : *values) most_ = std::max(most_, std::fabs(value));
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        int64_t bytes = -1;
        const int64_t slots = random.integer(1, 4);
        EXPECT_CODE(ICSEG_OK, icseg_transformer_block_workspace(batch_, count_, dim_, heads_, hidden_, keys_, listed_,
                                                                slots, &bytes));
        CHECK(bytes > 0);
        const Array<unsigned char> workspace = output<unsigned char>(random, bytes);
        const Array<float> out = output<float>(random, expected_.size());
        const Array<float> own = output<float>(random, expected_own_.size());
        std::vector<icseg_block_memory> pieces;
        for (const Tokens& piece : memory_) {
            pieces.push_back({piece.values.data(), piece.count, piece.stride_batch, piece.stride_token});
        }
        const auto call = [&](int64_t given) {
            const icseg_block block{
                norm_attention_.weight.data(), norm_attention_.bias.data(), query_.weight.data(), query_.bias.data(),
                key_value_.weight.data(), key_value_.bias.data(), out_.weight.data(), out_.bias.data(),
                norm_mlp_.weight.data(), norm_mlp_.bias.data(), mlp_in_.weight.data(), mlp_in_.bias.data(),
                mlp_out_.weight.data(), mlp_out_.bias.data(), eps_, dim_, heads_, hidden_, tokens_.values.data(),
                batch_, count_, tokens_.stride_batch, tokens_.stride_token, index_ ? index_->data() : nullptr,
                index_bytes_, listed_, listed_, 1, workspace.data(), given, slots};
            return icseg_transformer_block_f32(&block, pieces.data(), pieces.size(), out.data(), own.data());
        };
        EXPECT_CODE(ICSEG_WORKSPACE, call(bytes - 1));
        EXPECT_CODE(ICSEG_OK, call(bytes));
        if (switching()) return 0;
        expect_close("own", own, expected_own_, {1e-5 * most_});
        expect_close("out", out, expected_, {1e-4 * most_});
        Digest digest;
        digest.add(out);
        digest.add(own);
        return digest.value();
    }

private:
    // [batch, count, width] with gaps of NaN between rows, or expanded.
    struct Tokens {
        int64_t count, width, stride_token, stride_batch;
        Array<float> values;

        Tokens(Random& random, int64_t batch, int64_t count_given, int64_t width_given)
            : count(count_given), width(width_given), stride_token(width + random.pick<int64_t>({0, 0, 3})),
              stride_batch(random.chance(20) ? 0 : count * stride_token),
              values(random, batch * count == 0 ? 0 : (batch - 1) * stride_batch + (count - 1) * stride_token + width) {
            for (int64_t i = 0; i < values.count(); ++i) values[i] = NAN;
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t n = 0; n < count; ++n)
                    for (int64_t i = 0; i < width; ++i)
                        values[b * stride_batch + n * stride_token + i] = float(random.normal());
        }
        std::vector<double> row(int64_t b, int64_t n) const {
            std::vector<double> found;
            for (int64_t i = 0; i < width; ++i) found.push_back(values[b * stride_batch + n * stride_token + i]);
            return found;
        }
    };

    void follow(int64_t b) {
        Rows keys, own, seen;
        for (const Tokens& piece : memory_)
            for (int64_t n = 0; n < piece.count; ++n) keys.push_back(piece.row(b, n));
        for (int64_t n = 0; n < count_; ++n) {
            keys.push_back(key_value_(norm_attention_(tokens_.row(b, n))));
            expected_own_.insert(expected_own_.end(), keys.back().begin(), keys.back().end());
        }
        for (int64_t j = 0; j < listed_; ++j) {
            const int64_t key = index_bytes_ ? (*index_)[b * listed_ + j] : j;
            if (key >= 0 && key < keys_) seen.push_back(keys[key]);
        }
        for (int64_t n = 0; n < count_; ++n) {
            std::vector<double> token = tokens_.row(b, n), attended(dim_, 0.0);
            const std::vector<double> q = query_(norm_attention_(token));
            for (int64_t h = 0; h < heads_; ++h) attend(q, seen, h * dim_ / heads_, dim_ / heads_, attended);
            add(token, out_(attended));
            std::vector<double> x = mlp_in_(norm_mlp_(token));
            for (double& value : x) value *= std::erfc(-value / std::sqrt(2.0)) / 2;
            add(token, mlp_out_(x));
            expected_.insert(expected_.end(), token.begin(), token.end());
        }
    }

    void attend(const std::vector<double>& q, const Rows& seen, int64_t first, int64_t width,
                std::vector<double>& to) const {
        std::vector<double> scores;
        double most = -INFINITY, total = 0;
        for (const std::vector<double>& key : seen) {
            double score = 0;
            for (int64_t i = first; i < first + width; ++i) score += q[i] * key[i] / std::sqrt(double(width));
            scores.push_back(score);
            most = std::max(most, score);
        }
        for (double& score : scores) total += score = std::exp(score - most);
        for (size_t j = 0; j < seen.size(); ++j)
            for (int64_t i = first; i < first + width; ++i) to[i] += scores[j] / total * seen[j][dim_ + i];
    }

    static void add(std::vector<double>& to, const std::vector<double>& more) {
        for (size_t i = 0; i < to.size(); ++i) to[i] += more[i];
    }

    int64_t batch_, count_, heads_, dim_, hidden_;
    double eps_;
    Norm norm_attention_, norm_mlp_;
    Layer query_, key_value_, out_, mlp_in_, mlp_out_;
    Tokens tokens_;
    std::vector<Tokens> memory_;
    int64_t keys_, listed_, index_bytes_ = 0;
    std::unique_ptr<Array<int64_t>> index_;
    std::vector<double> expected_, expected_own_;
    double most_ = 1;
};

void errors() {
    const int64_t huge = int64_t(1) << 62;
    icseg_block good{};
    good.dim = 6, good.heads = 2, good.hidden = 4, good.batch = 0, good.count = 3, good.listed = 3, good.slots = 1;
    good.workspace_bytes = int64_t(1) << 40;
    const auto code = [](const icseg_block& block) {
        int64_t bytes;
        const int of_workspace = icseg_transformer_block_workspace(block.batch, block.count, block.dim, block.heads,
                                                                   block.hidden, block.count, block.listed,
                                                                   block.slots, &bytes);
        const int found = icseg_transformer_block_f32(&block, nullptr, 0, nullptr, nullptr);
        CHECK(of_workspace == ICSEG_OK || of_workspace == found);
        return found;
    };
    EXPECT_CODE(ICSEG_OK, code(good));
    struct Row {
        int64_t icseg_block::*field;
        int expected;
        std::vector<int64_t> values;
    };
    const std::vector<Row> rows{
        {&icseg_block::dim, ICSEG_BLOCK, {-2, 0, 5, 514, huge}},
        {&icseg_block::heads, ICSEG_BLOCK, {-1, 0, 4, 7, huge, INT64_MIN}},
        {&icseg_block::hidden, ICSEG_BLOCK, {-1, 0, 2049, huge}},
        {&icseg_block::batch, ICSEG_NEGATIVE_SIZE, {-1, INT64_MIN}},
        {&icseg_block::count, ICSEG_NEGATIVE_SIZE, {-1, INT64_MIN}},
        {&icseg_block::listed, ICSEG_NEGATIVE_SIZE, {-1, INT64_MIN}},
        {&icseg_block::batch, ICSEG_TOO_LARGE, {huge, INT64_MAX}},
        {&icseg_block::count, ICSEG_TOO_LARGE, {huge, INT64_MAX}},
        {&icseg_block::listed, ICSEG_TOO_LARGE, {huge, INT64_MAX}},
        {&icseg_block::slots, ICSEG_TOO_LARGE, {-1, 0, huge}},
        {&icseg_block::listed, ICSEG_RUNS, {0, 2, 4}},
        {&icseg_block::index_bytes, ICSEG_ELEMENT_BYTES, {-8, 1, 2, 16}},
        {&icseg_block::workspace_bytes, ICSEG_WORKSPACE, {-1, 0, 7}},
    };
    for (const Row& row : rows)
        for (const int64_t value : row.values) {
            icseg_block changed = good;
            changed.*row.field = value;
            EXPECT_CODE(row.expected, code(changed));
        }
    EXPECT_CODE(ICSEG_NEGATIVE_SIZE, icseg_transformer_block_f32(&good, nullptr, -1, nullptr, nullptr));
    const auto with = [&](std::vector<int64_t> lengths) {
        std::vector<icseg_block_memory> memory;
        for (const int64_t tokens : lengths) memory.push_back({nullptr, tokens, 0, 0});
        return icseg_transformer_block_f32(&good, memory.data(), memory.size(), nullptr, nullptr);
    };
    EXPECT_CODE(ICSEG_NEGATIVE_SIZE, with({5, -1}));
    EXPECT_CODE(ICSEG_TOO_LARGE, with({huge, huge}));
    EXPECT_CODE(ICSEG_TOO_LARGE, with({huge}));
    EXPECT_CODE(ICSEG_RUNS, with({1}));
    EXPECT_CODE(ICSEG_OK, with({0, 0}));
}

std::unique_ptr<Case> make(Random& random, bool large) { return std::make_unique<Block>(random, large); }

const Test test("transformer_block", make, errors);

}  // namespace
