/* icseg native library: plain C ABI, no Python and no torch.
 *
 * Every function that can fail returns an error code below and has then written nothing. The caller allocates all
 * memory. Sizes and coordinates count pixels, strides count elements (they may be 0 or negative), all of them int64.
 * Threads: OpenMP, as many as the calling thread's runtime allows; results do not depend on their number.
 */
#ifndef ICSEG_H
#define ICSEG_H

#include <stdint.h>

#define ICSEG_API __attribute__((visibility("default")))

/* Raised with every change to a signature or a meaning below. */
#define ICSEG_ABI_VERSION 3

enum icseg_code {
    ICSEG_OK = 0,
    ICSEG_NEGATIVE_SIZE = 1,
    ICSEG_PATCH_SIZE = 2,
    ICSEG_ELEMENT_BYTES = 3,
    ICSEG_TOO_LARGE = 4,
    ICSEG_ISA_UNKNOWN = 5,
    ICSEG_ISA_MISSING = 6,
    ICSEG_GROUPS = 20,
    ICSEG_ACTIVATION = 21,
};

#ifdef __cplusplus
extern "C" {
#endif

ICSEG_API int icseg_abi_version(void);

/* Compiler and OpenMP version, for bug reports. */
ICSEG_API const char* icseg_build(void);

/* Threads that a call from this thread may use; 1 without OpenMP. */
ICSEG_API int icseg_threads(void);

/* The instruction set in use: "portable", "avx2" or "avx512"; at first the widest that the machine has. */
ICSEG_API const char* icseg_isa(void);

/* Uses the one named from now on, in every thread; NULL: the widest that the machine has. For tests, and to compare. */
ICSEG_API int icseg_select_isa(const char* name);

/* One sentence for an error code. */
ICSEG_API const char* icseg_error(int code);

/* Cut patches out of images: an exact copy, zero outside the image.
 *
 * source   [outer, inner, channels, height, width], strides given, elements of element_bytes = 1, 2, 4 or 8
 * coords   [outer, inner, count, 2] contiguous: (y, x) of a patch's top-left corner, any value
 * patches  [outer, inner, count, channels, patch, patch] contiguous, every element written
 */
ICSEG_API int icseg_gather_patches(const void* source, const int64_t* coords, void* patches,
                                   int64_t outer, int64_t inner, int64_t channels, int64_t height, int64_t width,
                                   int64_t count, int64_t patch,
                                   int64_t stride_outer, int64_t stride_inner, int64_t stride_channel,
                                   int64_t stride_y, int64_t stride_x, int64_t element_bytes);

/* Its adjoint: add patches up into images, in the order of count; what lies outside is dropped.
 *
 * patches  [outer, inner, count, channels, patch, patch], strides given
 * coords   [outer, inner, count, 2] contiguous
 * images   [outer, inner, channels, height, width] contiguous, every element written
 */
ICSEG_API int icseg_gather_patches_backward_f32(const float* patches, const int64_t* coords, float* images,
                                                int64_t outer, int64_t inner, int64_t count, int64_t channels,
                                                int64_t patch, int64_t height, int64_t width,
                                                int64_t stride_outer, int64_t stride_inner, int64_t stride_count,
                                                int64_t stride_channel, int64_t stride_y, int64_t stride_x);
ICSEG_API int icseg_gather_patches_backward_f64(const double* patches, const int64_t* coords, double* images,
                                                int64_t outer, int64_t inner, int64_t count, int64_t channels,
                                                int64_t patch, int64_t height, int64_t width,
                                                int64_t stride_outer, int64_t stride_inner, int64_t stride_count,
                                                int64_t stride_channel, int64_t stride_y, int64_t stride_x);

/* The tail of a convolution of pairs: z[b, i, j] = activation(zx[b, i] + zy[b, j]), and its mean over j.
 *
 * zx, zy     [batch, xs, length], [batch, ys, length] contiguous
 * pairs      [batch, xs, ys, length] contiguous, every element written, or NULL; it may be zy where xs is 1
 * mean       [batch, xs, length] contiguous, every element written if ys > 0, added up in the order of j, or NULL
 * activation 0 none, 1 relu, 2 leaky relu (slope below 0: `slope`), 3 GELU
 */
ICSEG_API int icseg_cross_tail_f32(const float* zx, const float* zy, float* pairs, float* mean,
                                   int64_t batch, int64_t xs, int64_t ys, int64_t length,
                                   int64_t activation, double slope);
ICSEG_API int icseg_cross_tail_f64(const double* zx, const double* zy, double* pairs, double* mean,
                                   int64_t batch, int64_t xs, int64_t ys, int64_t length,
                                   int64_t activation, double slope);

/* Its gradients, from those of pairs and mean (either may be NULL, for zeros); added up in the order of i and j. */
ICSEG_API int icseg_cross_tail_backward_f32(const float* zx, const float* zy, const float* grad_pairs,
                                            const float* grad_mean, float* grad_zx, float* grad_zy,
                                            int64_t batch, int64_t xs, int64_t ys, int64_t length,
                                            int64_t activation, double slope);
ICSEG_API int icseg_cross_tail_backward_f64(const double* zx, const double* zy, const double* grad_pairs,
                                            const double* grad_mean, double* grad_zx, double* grad_zy,
                                            int64_t batch, int64_t xs, int64_t ys, int64_t length,
                                            int64_t activation, double slope);

/* Group normalisation, gain and bias, activation: out = act(gain * (x - mean) * rstd + bias).
 *
 * x, out     [samples, channels, length] contiguous; mean and rstd = 1 / sqrt(variance + eps) are those of
 *            channels / groups channels of a sample
 * gain, bias one a channel, at data[sample * stride_sample + channel * stride_channel]; NULL: 1 and 0
 * stats      [2, samples, groups] contiguous, written: mean, rstd
 * gelu       not 0: act is GELU; else the identity
 */
ICSEG_API int icseg_group_norm_film_f32(const float* x, const float* gain, const float* bias, float* out,
                                        float* stats, int64_t samples, int64_t channels, int64_t length,
                                        int64_t groups, int64_t gain_sample, int64_t gain_channel,
                                        int64_t bias_sample, int64_t bias_channel, int64_t gelu, double eps);
ICSEG_API int icseg_group_norm_film_f64(const double* x, const double* gain, const double* bias, double* out,
                                        double* stats, int64_t samples, int64_t channels, int64_t length,
                                        int64_t groups, int64_t gain_sample, int64_t gain_channel,
                                        int64_t bias_sample, int64_t bias_channel, int64_t gelu, double eps);

/* Its gradients.
 *
 * grad       [samples, channels, length] contiguous, of out
 * stats      as written by the forward
 * grad_x     [samples, channels, length] contiguous, every element written
 * sums       [2, samples, channels] contiguous, every element written: of gain and of bias, a sample at a time
 */
ICSEG_API int icseg_group_norm_film_backward_f32(const float* grad, const float* x, const float* stats,
                                                 const float* gain, const float* bias, float* grad_x, float* sums,
                                                 int64_t samples, int64_t channels, int64_t length,
                                                 int64_t groups, int64_t gain_sample, int64_t gain_channel,
                                                 int64_t bias_sample, int64_t bias_channel, int64_t gelu);
ICSEG_API int icseg_group_norm_film_backward_f64(const double* grad, const double* x, const double* stats,
                                                 const double* gain, const double* bias, double* grad_x, double* sums,
                                                 int64_t samples, int64_t channels, int64_t length,
                                                 int64_t groups, int64_t gain_sample, int64_t gain_channel,
                                                 int64_t bias_sample, int64_t bias_channel, int64_t gelu);

#ifdef __cplusplus
}
#endif

#endif
