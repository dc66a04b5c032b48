// selected_attention: softmax attention over lists of keys, and its gradients.
#include "kernels/selected_attention.h"

#include "checks.h"

namespace icseg {
namespace {

constexpr int64_t kAlign = 64;

struct Shape {
    int64_t batch, heads, queries, dim, value_dim, groups, listed, indexed, runs, slots;
};

// Bytes in *bytes; an error code if sizes are impossible. Past it, no product or sum of sizes overflows.
int workspace(const Shape& s, int64_t element_bytes, bool backward, int64_t* bytes) {
    if (any_negative({s.batch, s.heads, s.queries, s.dim, s.value_dim, s.groups, s.listed, s.runs})) {
        return ICSEG_NEGATIVE_SIZE;
    }
    if (element_bytes != 4 && element_bytes != 8) return ICSEG_ELEMENT_BYTES;
    if (s.groups < 1 || s.slots < 1 || s.queries % s.groups || (!s.indexed && s.groups > 1)) return ICSEG_RUNS;
    constexpr int64_t most = int64_t{1} << 40;
    if (std::max({s.queries, s.dim, s.value_dim, s.listed, s.runs, s.slots}) > most) return ICSEG_TOO_LARGE;
    int64_t units, product, tokens = 4 * (s.queries + s.listed + 32 * s.runs + 256);
    if (!multiply({s.batch, s.heads, s.groups}, &units) ||
        !multiply({units, s.slots, 4}, &product) ||
        !multiply({std::max<int64_t>(units, 1), tokens, s.dim + s.value_dim + 64, 64}, &product) ||
        !multiply({s.slots, tokens, s.dim + s.value_dim + 64, 64}, &product) ||
        !multiply({tokens, tokens, s.dim + s.value_dim + 64}, &product)) {
        return ICSEG_TOO_LARGE;
    }
    const int64_t places = whole_units(units, s.slots) ? s.slots : units;
    int64_t elements;
    if (backward) {
        const BackwardSpace space(s.dim, s.value_dim, s.queries / s.groups, s.listed, s.runs, units);
        elements = places * space.unit.end + s.slots * space.slot.end;
        if (s.indexed) elements += padded(units * s.listed * (s.dim + s.value_dim));
    } else {
        const ForwardSpace space(s.dim, s.value_dim, s.listed);
        elements = places * space.unit.end + s.slots * space.slot.end;
    }
    const int64_t lists = s.indexed ? padded(s.batch * s.groups * (2 * s.listed + 1)) : 0;
    *bytes = kAlign + lists * static_cast<int64_t>(sizeof(int64_t)) + elements * element_bytes;
    return ICSEG_OK;
}

int checked(icseg_attention& call, const Runs& runs, int64_t element_bytes, bool backward) {
    const Shape shape{call.batch,  call.heads,  call.queries,         call.dim,   call.value_dim,
                      call.groups, call.listed, call.index_bytes != 0, runs.count, call.slots};
    int64_t bytes;
    if (const int code = workspace(shape, element_bytes, backward, &bytes)) return code;
    if (call.keys < 0) return ICSEG_NEGATIVE_SIZE;
    if (!call.index_bytes && call.listed > call.keys) return ICSEG_RUNS;
    if (call.index_bytes && call.index_bytes != 4 && call.index_bytes != 8) return ICSEG_ELEMENT_BYTES;
    int64_t product;
    if (!multiply({call.batch, call.heads, call.keys, call.dim + call.value_dim, element_bytes}, &product)) {
        return ICSEG_TOO_LARGE;
    }
    int64_t left = call.queries;
    for (int64_t i = 0; i < runs.count; ++i) {
        const int64_t queries = runs.pairs[2 * i], keys = runs.pairs[2 * i + 1];
        if (queries < 1 || queries > left || keys < 0 || keys > call.listed) return ICSEG_RUNS;
        if (call.groups > 1 && queries % (call.queries / call.groups)) return ICSEG_RUNS;
        left -= queries;
    }
    if (runs.count && left) return ICSEG_RUNS;
    if (call.workspace_bytes < bytes) return ICSEG_WORKSPACE;
    const auto address = reinterpret_cast<uintptr_t>(call.workspace);
    call.workspace = reinterpret_cast<void*>((address + kAlign - 1) / kAlign * kAlign);
    return ICSEG_OK;
}

template <typename Real>
int forward(icseg_attention call, const Runs& runs, Real* out, Real* lse) {
    if (const int code = checked(call, runs, sizeof(Real), false)) return code;
    ICSEG_CHOSEN(attention<Real>)(call, runs, out, lse);
    return ICSEG_OK;
}

template <typename Real>
int backward(icseg_attention call, const Runs& runs, const AttentionGradients<Real>& gradients) {
    if (const int code = checked(call, runs, sizeof(Real), true)) return code;
    ICSEG_CHOSEN(attention_backward<Real>)(call, runs, gradients);
    return ICSEG_OK;
}

}  // namespace
}  // namespace icseg

int icseg_selected_attention_workspace(int64_t batch, int64_t heads, int64_t queries, int64_t dim, int64_t value_dim,
                                       int64_t groups, int64_t listed, int64_t indexed, int64_t runs, int64_t slots,
                                       int64_t element_bytes, int64_t backward, int64_t* bytes) {
    return icseg::workspace({batch, heads, queries, dim, value_dim, groups, listed, indexed, runs, slots},
                            element_bytes, backward != 0, bytes);
}

int icseg_selected_attention_f32(const icseg_attention* call, const int64_t* runs, int64_t run_count, float* out,
                                 float* lse) {
    return icseg::forward(*call, {runs, run_count}, out, lse);
}

int icseg_selected_attention_f64(const icseg_attention* call, const int64_t* runs, int64_t run_count, double* out,
                                 double* lse) {
    return icseg::forward(*call, {runs, run_count}, out, lse);
}

int icseg_selected_attention_backward_f32(const icseg_attention* call, const int64_t* runs, int64_t run_count,
                                          const icseg_heads* out, const icseg_heads* grad_out, const float* lse,
                                          const float* grad_lse, float* grad_q, float* grad_k, float* grad_v) {
    return icseg::backward<float>(*call, {runs, run_count},
                                  {*out, *grad_out, lse, grad_lse, grad_q, grad_k, grad_v});
}

int icseg_selected_attention_backward_f64(const icseg_attention* call, const int64_t* runs, int64_t run_count,
                                          const icseg_heads* out, const icseg_heads* grad_out, const double* lse,
                                          const double* grad_lse, double* grad_q, double* grad_k, double* grad_v) {
    return icseg::backward<double>(*call, {runs, run_count},
                                   {*out, *grad_out, lse, grad_lse, grad_q, grad_k, grad_v});
}
