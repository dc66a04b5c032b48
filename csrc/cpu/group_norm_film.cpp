// group_norm_film: group normalisation, gain and bias, GELU; and the gradients.
#include "kernels/group_norm_film.h"

#include "checks.h"
#include "pages.h"

namespace icseg {
namespace {

// Fills in the bytes; an error code if sizes are impossible. Past it, no product or sum of sizes overflows.
int checked(FilmSizes& s, int64_t element_bytes) {
    if (any_negative({s.samples, s.channels, s.length})) return ICSEG_NEGATIVE_SIZE;
    if (s.groups < 1 || s.channels % s.groups) return ICSEG_GROUPS;
    int64_t three, stats;
    const bool fits = multiply({s.channels, s.length, element_bytes, s.samples}, &s.bytes) &&
                      multiply({s.bytes, 3}, &three) && multiply({s.channels, 2, element_bytes, s.samples}, &three) &&
                      multiply({s.groups, 2, element_bytes, s.samples}, &stats);
    return fits ? ICSEG_OK : ICSEG_TOO_LARGE;
}

template <typename Real>
int forward(const Real* x, const Film<Real>& gain, const Film<Real>& bias, Real* out, Real* stats, FilmSizes sizes,
            double eps) {
    if (const int code = checked(sizes, sizeof(Real))) return code;
    expect_writes(out, sizes.bytes);
    ICSEG_CHOSEN(group_norm_film<Real>)(x, gain, bias, out, stats, sizes, eps);
    return ICSEG_OK;
}

template <typename Real>
int backward(const Real* grad, const Real* x, const Real* stats, const Film<Real>& gain, const Film<Real>& bias,
             Real* grad_x, Real* sums, FilmSizes sizes) {
    if (const int code = checked(sizes, sizeof(Real))) return code;
    expect_writes(grad_x, sizes.bytes);
    ICSEG_CHOSEN(group_norm_film_backward<Real>)(grad, x, stats, gain, bias, grad_x, sums, sizes);
    return ICSEG_OK;
}

}  // namespace
}  // namespace icseg

#define ICSEG_FILM(Real, suffix)                                                                                      \
    int icseg_group_norm_film_##suffix(const Real* x, const Real* gain, const Real* bias, Real* out, Real* stats,     \
                                       int64_t samples, int64_t channels, int64_t length, int64_t groups,             \
                                       int64_t gain_sample, int64_t gain_channel, int64_t bias_sample,                \
                                       int64_t bias_channel, int64_t gelu, double eps) {                              \
        return icseg::forward<Real>(x, {gain, gain_sample, gain_channel}, {bias, bias_sample, bias_channel}, out,     \
                                    stats, {samples, channels, length, groups, gelu != 0, 0}, eps);                   \
    }                                                                                                                 \
    int icseg_group_norm_film_backward_##suffix(                                                                      \
        const Real* grad, const Real* x, const Real* stats, const Real* gain, const Real* bias, Real* grad_x,         \
        Real* sums, int64_t samples, int64_t channels, int64_t length, int64_t groups, int64_t gain_sample,           \
        int64_t gain_channel, int64_t bias_sample, int64_t bias_channel, int64_t gelu) {                              \
        return icseg::backward<Real>(grad, x, stats, {gain, gain_sample, gain_channel},                               \
                                     {bias, bias_sample, bias_channel}, grad_x, sums,                                 \
                                     {samples, channels, length, groups, gelu != 0, 0});                              \
    }
ICSEG_FILM(float, f32)
ICSEG_FILM(double, f64)
