// icseg_selected_attention and its gradients, query by query.
#include "testing.h"

#include <algorithm>

namespace {

using namespace testing;

int attend(const icseg_attention* call, const std::vector<int64_t>& runs, float* out, float* lse) {
    return icseg_selected_attention_f32(call, runs.data(), runs.size() / 2, out, lse);
}
int attend(const icseg_attention* call, const std::vector<int64_t>& runs, double* out, double* lse) {
    return icseg_selected_attention_f64(call, runs.data(), runs.size() / 2, out, lse);
}
int attend_backward(const icseg_attention* call, const std::vector<int64_t>& runs, const icseg_heads* out,
                    const icseg_heads* grad_out, const float* lse, const float* grad_lse, float* q, float* k, float* v) {
    return icseg_selected_attention_backward_f32(call, runs.data(), runs.size() / 2, out, grad_out, lse, grad_lse, q, k, v);
}
int attend_backward(const icseg_attention* call, const std::vector<int64_t>& runs, const icseg_heads* out,
                    const icseg_heads* grad_out, const double* lse, const double* grad_lse, double* q, double* k,
                    double* v) {
    return icseg_selected_attention_backward_f64(call, runs.data(), runs.size() / 2, out, grad_out, lse, grad_lse, q, k, v);
}


struct Sizes {
    int64_t batch, heads, queries, keys, dim, value_dim, groups, listed, index_bytes, sink;
    bool turned;

    Sizes(Random& random, bool large)
        : batch(random.size(2)),
          heads(random.size(3)),
          queries(0),
          keys(random.size(random.chance(20) ? 150 : 20)),
          dim(random.size(random.chance(20) ? 70 : 20)),
          value_dim(random.size(20)),
          groups(1),
          listed(keys),
          index_bytes(random.pick<int64_t>({0, 4, 8})),
          sink(random.chance(40)),
          turned(random.chance(30)) {
        if (large) batch = 2, heads = 2, keys = listed = 200, dim = 16, value_dim = 24;
        if (index_bytes) groups = random.integer(1, 3), listed = random.size(large ? 150 : 30);
        queries = groups * (large ? 80 : random.size(random.chance(20) ? 40 : 9));
        if (turned) dim += dim % 2;
    }
};

template <typename Real>
icseg_heads heads_of(const Strided<Real>& tensor) {
    const auto& t = tensor.strides;
    return {tensor.data(), t[0], t[1], t[2], t[3]};
}

template <typename Real>
class Attention : public Case {
public:
    Attention(Random& random, bool large)
        : s_(random, large),
          q_(random, {s_.batch, s_.heads, s_.queries, s_.dim}),
          k_(random, {s_.batch, s_.heads, s_.keys, s_.dim}),
          v_(random, {s_.batch, s_.heads, s_.keys, s_.value_dim}),
          q_cos_(random, {s_.batch, s_.heads, s_.turned ? s_.queries : 0, s_.dim / 2}),
          q_sin_(random, {s_.batch, s_.heads, s_.turned ? s_.queries : 0, s_.dim / 2}),
          k_cos_(random, {s_.batch, s_.heads, s_.turned ? s_.keys : 0, s_.dim / 2}),
          k_sin_(random, {s_.batch, s_.heads, s_.turned ? s_.keys : 0, s_.dim / 2}),
          grad_out_(random, {s_.batch, s_.heads, s_.queries, s_.value_dim}),
          index32_(random, {s_.batch, s_.groups, s_.index_bytes == 4 ? s_.listed : 0}),
          index64_(random, {s_.batch, s_.groups, s_.index_bytes == 8 ? s_.listed : 0}),
          grad_lse_(normals<Real>(random, random.chance(50) ? s_.batch * s_.heads * s_.queries : 0)),
          scale_(random.pick({0.25, 1.0, -0.5})) {
        for (Strided<Real>* tensor : {&q_, &k_, &v_, &q_cos_, &q_sin_, &k_cos_, &k_sin_, &grad_out_})
            tensor->fill(random, false);
        for (int64_t i = 0; i < index32_.storage().count(); ++i)
            index32_.storage()[i] = static_cast<int32_t>(
                random.chance(85) ? random.integer(0, std::max<int64_t>(s_.keys - 1, 0))
                                  : random.pick<int64_t>({INT32_MIN, -1, s_.keys, INT32_MAX}));
        for (int64_t i = 0; i < index64_.storage().count(); ++i)
            index64_.storage()[i] = random.chance(85) ? random.integer(0, std::max<int64_t>(s_.keys - 1, 0))
                                                      : random.pick<int64_t>({INT64_MIN, -1, s_.keys, INT64_MAX});
        if (random.chance(50) && s_.queries) {
            const int64_t least = s_.groups > 1 ? s_.queries / s_.groups : 1;
            for (int64_t left = s_.queries; left;) {
                const int64_t queries = random.chance(50) ? left : least * random.integer(1, left / least);
                runs_.insert(runs_.end(), {queries, random.chance(20) ? 0 : random.integer(0, s_.listed)});
                left -= queries;
            }
        }
        define();
    }

    uint64_t run(uint64_t seed) const override {
        Random random(seed);
        icseg_attention call = {};
        call.q = heads_of(q_), call.k = heads_of(k_), call.v = heads_of(v_);
        if (s_.turned) {
            call.q_cos = heads_of(q_cos_), call.q_sin = heads_of(q_sin_);
            call.k_cos = heads_of(k_cos_), call.k_sin = heads_of(k_sin_);
            // Of empty tensors too an address says that they are given.
            for (icseg_heads* heads : {&call.q_cos, &call.q_sin, &call.k_cos, &call.k_sin})
                if (!heads->data) heads->data = this;
        }
        const std::vector<int64_t>& t = s_.index_bytes == 4 ? index32_.strides : index64_.strides;
        call.index = s_.index_bytes == 4 ? static_cast<const void*>(index32_.data()) : index64_.data();
        call.index_bytes = s_.index_bytes;
        call.stride_index_batch = t[0], call.stride_index_group = t[1], call.stride_index_entry = t[2];
        call.batch = s_.batch, call.heads = s_.heads, call.queries = s_.queries, call.keys = s_.keys;
        call.dim = s_.dim, call.value_dim = s_.value_dim, call.groups = s_.groups, call.listed = s_.listed;
        call.sink = s_.sink, call.scale = scale_, call.slots = kSlots;

        Digest digest;
        const int64_t rows = s_.batch * s_.heads * s_.queries;
        const Array<Real> out = output<Real>(random, rows * s_.value_dim), lse = output<Real>(random, rows);
        with_workspace(random, call, false, [&] { return attend(&call, runs_, out.data(), lse.data()); });
        const double bound = sizeof(Real) == 4 ? 3e-4 : 1e-11;
        expect_close("out", out, out_, {bound});
        expect_close("lse", lse, lse_, {bound});
        digest.add(out);
        digest.add(lse);

        const Array<Real> grad_q = output<Real>(random, rows * s_.dim);
        const Array<Real> grad_k = output<Real>(random, s_.batch * s_.heads * s_.keys * s_.dim);
        const Array<Real> grad_v = output<Real>(random, s_.batch * s_.heads * s_.keys * s_.value_dim);
        const int64_t width = s_.value_dim;
        const icseg_heads saved = {out.data(), s_.queries * s_.heads * width, width, s_.heads * width, 1};
        const icseg_heads grad = heads_of(grad_out_);
        with_workspace(random, call, true, [&] {
            return attend_backward(&call, runs_, &saved, &grad, lse.data(), grad_lse_.count() ? grad_lse_.data() : nullptr,
                                   grad_q.data(), grad_k.data(), grad_v.data());
        });
        const double slack = bound * static_cast<double>(10 + s_.queries);
        expect_close("grad_q", grad_q, grad_q_, {20 * bound});
        expect_close("grad_k", grad_k, grad_k_, {slack});
        expect_close("grad_v", grad_v, grad_v_, {slack});
        digest.add(grad_q);
        digest.add(grad_k);
        digest.add(grad_v);
        return digest.value();
    }

private:
    static constexpr int64_t kSlots = 3;

    template <typename Call>
    void with_workspace(Random& random, icseg_attention& call, bool backward, const Call& body) const {
        int64_t bytes = -1;
        EXPECT_CODE(ICSEG_OK, icseg_selected_attention_workspace(s_.batch, s_.heads, s_.queries, s_.dim, s_.value_dim,
                                                                 s_.groups, s_.listed, s_.index_bytes != 0,
                                                                 runs_.size() / 2, call.slots, sizeof(Real), backward, &bytes));
        // Aligned to 16 bytes, as torch's allocations are at least.
        const Array<Half> workspace = output<Half>(random, (bytes + 15) / 16);
        call.workspace = workspace.data(), call.workspace_bytes = bytes;
        EXPECT_CODE(ICSEG_OK, body());
        call.workspace_bytes = bytes - 1;
        if (bytes) EXPECT_CODE(ICSEG_WORKSPACE, body());
    }
    struct alignas(16) Half {
        char bytes[16];
    };

    int64_t listed_row(int64_t b, int64_t query, int64_t entry) const {
        if (s_.index_bytes == 0) return entry;
        const int64_t group = query / (s_.queries / s_.groups);
        return s_.index_bytes == 4 ? index32_.at({b, group, entry}) : index64_.at({b, group, entry});
    }

    // A row of q or k, turned by its angles.
    std::vector<double> row(const Strided<Real>& x, const Strided<Real>& cos, const Strided<Real>& sin, int64_t b,
                            int64_t h, int64_t n) const {
        std::vector<double> values;
        for (int64_t d = 0; d < s_.dim; ++d) values.push_back(x.at({b, h, n, d}));
        return s_.turned ? turned(values, cos, sin, b, h, n, 1) : values;
    }
    std::vector<double> turned(const std::vector<double>& x, const Strided<Real>& cos, const Strided<Real>& sin, int64_t b,
                               int64_t h, int64_t n, double way) const {
        std::vector<double> y(x.size());
        for (int64_t p = 0; p < s_.dim / 2; ++p) {
            const double c = cos.at({b, h, n, p}), s = way * sin.at({b, h, n, p});
            y[2 * p] = x[2 * p] * c - x[2 * p + 1] * s;
            y[2 * p + 1] = x[2 * p] * s + x[2 * p + 1] * c;
        }
        return y;
    }

    void define() {
        const int64_t rows = s_.batch * s_.heads * s_.queries;
        out_.assign(rows * s_.value_dim, 0), lse_.assign(rows, 0), grad_q_.assign(rows * s_.dim, 0);
        grad_k_.assign(s_.batch * s_.heads * s_.keys * s_.dim, 0);
        grad_v_.assign(s_.batch * s_.heads * s_.keys * s_.value_dim, 0);
        for (int64_t b = 0; b < s_.batch; ++b)
            for (int64_t h = 0; h < s_.heads; ++h) {
                std::vector<std::vector<double>> key;
                for (int64_t n = 0; n < s_.keys; ++n) key.push_back(row(k_, k_cos_, k_sin_, b, h, n));
                std::vector<std::vector<double>> grad_key(s_.keys, std::vector<double>(s_.dim, 0));
                size_t part = 0;
                int64_t end = runs_.empty() ? s_.queries : runs_[0];
                for (int64_t n = 0; n < s_.queries; ++n) {
                    while (n == end) part += 2, end += runs_[part];
                    one(b, h, n, runs_.empty() ? s_.listed : runs_[part + 1], key, grad_key);
                }
                for (int64_t n = 0; n < s_.keys; ++n) {
                    if (s_.turned) grad_key[n] = turned(grad_key[n], k_cos_, k_sin_, b, h, n, -1);
                    for (int64_t d = 0; d < s_.dim; ++d)
                        grad_k_[((b * s_.heads + h) * s_.keys + n) * s_.dim + d] = grad_key[n][d];
                }
            }
    }

    void one(int64_t b, int64_t h, int64_t n, int64_t entries, const std::vector<std::vector<double>>& key,
             std::vector<std::vector<double>>& grad_key) {
        const std::vector<double> query = row(q_, q_cos_, q_sin_, b, h, n);
        std::vector<int64_t> keys;
        std::vector<double> scores;
        double most = s_.sink ? 0 : -INFINITY;
        for (int64_t e = 0; e < entries; ++e) {
            const int64_t m = listed_row(b, n, e);
            if (m < 0 || m >= s_.keys) continue;
            double score = 0;
            for (int64_t d = 0; d < s_.dim; ++d) score += query[d] * key[m][d];
            keys.push_back(m), scores.push_back(scale_ * score);
            most = std::fmax(most, scores.back());
        }
        const int64_t at = (b * s_.heads + h) * s_.queries + n;
        double sum = s_.sink ? std::exp(-most) : 0;
        for (const double score : scores) sum += std::exp(score - most);
        lse_[at] = keys.empty() && !s_.sink ? -INFINITY : most + std::log(sum);
        if (keys.empty()) return;
        std::vector<double> result(s_.value_dim, 0);
        for (size_t i = 0; i < keys.size(); ++i)
            for (int64_t d = 0; d < s_.value_dim; ++d)
                result[d] += std::exp(scores[i] - lse_[at]) * v_.at({b, h, keys[i], d});
        double mean = grad_lse_.count() ? -grad_lse_[at] : 0;
        for (int64_t d = 0; d < s_.value_dim; ++d) {
            out_[((b * s_.queries + n) * s_.heads + h) * s_.value_dim + d] = result[d];
            mean += result[d] * grad_out_.at({b, h, n, d});
        }
        std::vector<double> grad_query(s_.dim, 0);
        for (size_t i = 0; i < keys.size(); ++i) {
            const double p = std::exp(scores[i] - lse_[at]);
            double slope = -mean;
            for (int64_t d = 0; d < s_.value_dim; ++d) {
                slope += grad_out_.at({b, h, n, d}) * v_.at({b, h, keys[i], d});
                grad_v_[((b * s_.heads + h) * s_.keys + keys[i]) * s_.value_dim + d] += p * grad_out_.at({b, h, n, d});
            }
            for (int64_t d = 0; d < s_.dim; ++d) {
                grad_query[d] += scale_ * p * slope * key[keys[i]][d];
                grad_key[keys[i]][d] += scale_ * p * slope * query[d];
            }
        }
        if (s_.turned) grad_query = turned(grad_query, q_cos_, q_sin_, b, h, n, -1);
        for (int64_t d = 0; d < s_.dim; ++d) grad_q_[at * s_.dim + d] = grad_query[d];
    }

    Sizes s_;
    Strided<Real> q_, k_, v_, q_cos_, q_sin_, k_cos_, k_sin_, grad_out_;
    Strided<int32_t> index32_;
    Strided<int64_t> index64_;
    Array<Real> grad_lse_;
    double scale_;
    std::vector<int64_t> runs_;
    std::vector<double> out_, lse_, grad_q_, grad_k_, grad_v_;
};

void errors() {
    icseg_attention fine = {};
    fine.batch = 1, fine.heads = 2, fine.queries = 4, fine.keys = 5, fine.dim = 8, fine.value_dim = 3;
    fine.groups = 1, fine.listed = 5, fine.scale = 1, fine.slots = 1, fine.workspace_bytes = INT64_MAX;
    const icseg_heads none = {};
    const auto expect = [&](int code, const icseg_attention& call, const std::vector<int64_t>& runs) {
        float* const f32 = nullptr;
        double* const f64 = nullptr;
        EXPECT_CODE(code, attend(&call, runs, f32, f32));
        EXPECT_CODE(code, attend(&call, runs, f64, f64));
        EXPECT_CODE(code, attend_backward(&call, runs, &none, &none, f32, f32, f32, f32, f32));
        EXPECT_CODE(code, attend_backward(&call, runs, &none, &none, f64, f64, f64, f64, f64));
    };
    const auto changed = [&](int64_t icseg_attention::*field, int64_t value) {
        icseg_attention call = fine;
        call.*field = value;
        return call;
    };
    using A = icseg_attention;
    for (int64_t A::*field : {&A::batch, &A::heads, &A::queries, &A::keys, &A::dim, &A::value_dim, &A::listed}) {
        expect(ICSEG_NEGATIVE_SIZE, changed(field, -1), {});
        expect(ICSEG_NEGATIVE_SIZE, changed(field, INT64_MIN), {});
    }
    for (int64_t A::*field : {&A::batch, &A::heads, &A::queries, &A::dim, &A::value_dim})
        expect(ICSEG_TOO_LARGE, changed(field, INT64_MAX), {});
    for (int64_t A::*field : {&A::groups, &A::slots}) expect(ICSEG_RUNS, changed(field, 0), {});
    expect(ICSEG_RUNS, changed(&A::groups, 3), {});
    expect(ICSEG_RUNS, changed(&A::listed, 6), {});
    expect(ICSEG_ELEMENT_BYTES, changed(&A::index_bytes, 2), {});
    for (const std::vector<int64_t>& runs : std::vector<std::vector<int64_t>>{
             {3, 5}, {5, 5}, {4, 6}, {4, -1}, {0, 5, 4, 5}, {-4, 5, 8, 5}, {INT64_MAX, 5}, {4, INT64_MIN}})
        expect(ICSEG_RUNS, fine, runs);
    expect(ICSEG_WORKSPACE, changed(&A::workspace_bytes, 0), {});
}

std::unique_ptr<Case> make(Random& random, bool large) {
    if (random.chance(50)) return std::make_unique<Attention<float>>(random, large);
    return std::make_unique<Attention<double>>(random, large);
}

const Test test("selected_attention", make, errors);

}  // namespace
