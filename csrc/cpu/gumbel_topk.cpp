// gumbel_topk: drawing without replacement, its gradient, and the noise alone.
#include "kernels/gumbel_topk.h"

#include "checks.h"
#include "kernels/draw_sizes.h"

namespace icseg {
namespace {

// An error code if sizes are impossible. Past it, no product or sum of sizes overflows.
int checked(const DrawSizes& s, int64_t element_bytes) {
    if (any_negative({s.batch, s.count, s.k})) return ICSEG_NEGATIVE_SIZE;
    if (s.k > s.count) return ICSEG_DRAWS;
    constexpr int64_t kIndexBytes = sizeof(int64_t);
    int64_t bytes;
    // Indices fit 32 bits in the kernels' keys, and rows the counter of the noise.
    const bool fits = s.count <= INT32_MAX && s.batch <= UINT32_MAX &&
                      multiply({s.batch, s.count + 1, 4, kIndexBytes + element_bytes}, &bytes);
    return fits ? ICSEG_OK : ICSEG_TOO_LARGE;
}

template <typename Real>
int draw_checked(const Real* logits, int64_t stride, const DrawNoise<Real>& noise, const DrawOutputs<Real>& out,
                 const DrawSizes& sizes, void* workspace, int64_t workspace_bytes) {
    if (const int code = checked(sizes, sizeof(Real))) return code;
    const int64_t row_bytes = draw_row_bytes(sizes.count, sizes.k, sizeof(Real));
    if (workspace_bytes < row_bytes) return ICSEG_WORKSPACE;
    if (row_bytes == 0) workspace = nullptr;
    const int64_t slots = row_bytes == 0 ? 0 : workspace_bytes / row_bytes;
    ICSEG_CHOSEN(draw<Real>)(logits, stride, noise, out, sizes, workspace, slots);
    return ICSEG_OK;
}

template <typename Real>
int draw_backward_checked(const DrawGradients<Real>& in, Real* grad, const DrawSizes& sizes) {
    if (const int code = checked(sizes, sizeof(Real))) return code;
    ICSEG_CHOSEN(draw_backward<Real>)(in, grad, sizes);
    return ICSEG_OK;
}

}  // namespace

}  // namespace icseg

#define ICSEG_DRAW(suffix, Real)                                                                                     \
    int icseg_gumbel_topk_##suffix(const Real* logits, const Real* noise, int64_t* indices, Real* scores,            \
                                   Real* logsumexp, Real* kappa, int64_t* kappa_index, void* workspace,              \
                                   int64_t workspace_bytes, int64_t batch, int64_t count, int64_t k,                 \
                                   int64_t logits_stride, int64_t noise_stride, int64_t seeded, uint64_t seed) {     \
        return icseg::draw_checked<Real>(logits, logits_stride, {noise, noise_stride, seeded != 0, seed},            \
                                         {indices, scores, logsumexp, kappa, kappa_index}, {batch, count, k},        \
                                         workspace, workspace_bytes);                                                \
    }                                                                                                                \
    int icseg_gumbel_topk_backward_##suffix(                                                                         \
        const Real* logits, const int64_t* indices, const int64_t* kappa_index, const Real* logsumexp,               \
        const Real* grad_scores, const Real* grad_logsumexp, const Real* grad_kappa, Real* grad, int64_t batch,      \
        int64_t count, int64_t k, int64_t logits_stride) {                                                           \
        return icseg::draw_backward_checked<Real>({logits, logits_stride, indices, kappa_index, logsumexp,           \
                                                   grad_scores, grad_logsumexp, grad_kappa},                         \
                                                  grad, {batch, count, k});                                          \
    }
ICSEG_DRAW(f32, float)
ICSEG_DRAW(f64, double)

int icseg_gumbel_noise(float* noise, int64_t rows, int64_t elements, uint64_t seed, int64_t stream, int64_t offset) {
    using namespace icseg;
    if (any_negative({rows, elements, stream, offset})) return ICSEG_NEGATIVE_SIZE;
    int64_t bytes;
    const bool fits = rows <= UINT32_MAX && elements / 4 < UINT32_MAX && stream <= UINT32_MAX &&
                      offset <= UINT32_MAX && multiply({rows, elements, 16}, &bytes);
    if (!fits) return ICSEG_TOO_LARGE;
    ICSEG_CHOSEN(gumbel_noise)
    (seed, static_cast<uint32_t>(stream), static_cast<uint32_t>(offset), noise, rows, elements);
    return ICSEG_OK;
}
