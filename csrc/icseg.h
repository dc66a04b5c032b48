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
    ICSEG_DRAWS = 7,
    ICSEG_WORKSPACE = 8,
    ICSEG_WINDOWS = 9,
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

/* Draw k of count elements of each row without replacement: the k largest of logits + noise, descending, equal ones by
 * ascending index. The noise is `noise`, or with seeded != 0 the library's own under `seed`, or none.
 *
 * logits      [batch, count], rows logits_stride apart; -inf and NaN are never drawn
 * noise       [batch, count], rows noise_stride apart, or NULL
 * indices     [batch, k] contiguous, and scores likewise: the element and its logit + noise; -1 and -inf where none
 *             was left
 * logsumexp   [batch] of the logits
 * kappa       [batch] the (k + 1)-th score, and its element in kappa_index; -inf and -1 where there is none
 * workspace   any multiple of 4 * (bytes of an element) * (min(count, 2 k + 258) + 1) bytes, aligned to 16: as many
 *             rows are drawn at a time. Not used (NULL) for k <= 256.
 */
ICSEG_API int icseg_gumbel_topk_f32(const float* logits, const float* noise, int64_t* indices, float* scores,
                                    float* logsumexp, float* kappa, int64_t* kappa_index, void* workspace,
                                    int64_t workspace_bytes, int64_t batch, int64_t count, int64_t k,
                                    int64_t logits_stride, int64_t noise_stride, int64_t seeded, uint64_t seed);
ICSEG_API int icseg_gumbel_topk_f64(const double* logits, const double* noise, int64_t* indices, double* scores,
                                    double* logsumexp, double* kappa, int64_t* kappa_index, void* workspace,
                                    int64_t workspace_bytes, int64_t batch, int64_t count, int64_t k,
                                    int64_t logits_stride, int64_t noise_stride, int64_t seeded, uint64_t seed);

/* Its gradient: grad_scores and grad_kappa at their elements, plus grad_logsumexp times softmax(logits).
 *
 * logits      [batch, count], rows logits_stride apart; indices, kappa_index, logsumexp as the draw gave them: an
 *             index outside 0 <= index < count is skipped
 * grad_*      contiguous; with grad_logsumexp NULL, logits and logsumexp are not read: the gradient of the noise
 * grad        [batch, count] contiguous, every element written
 */
ICSEG_API int icseg_gumbel_topk_backward_f32(const float* logits, const int64_t* indices, const int64_t* kappa_index,
                                             const float* logsumexp, const float* grad_scores,
                                             const float* grad_logsumexp, const float* grad_kappa, float* grad,
                                             int64_t batch, int64_t count, int64_t k, int64_t logits_stride);
ICSEG_API int icseg_gumbel_topk_backward_f64(const double* logits, const int64_t* indices, const int64_t* kappa_index,
                                             const double* logsumexp, const double* grad_scores,
                                             const double* grad_logsumexp, const double* grad_kappa, double* grad,
                                             int64_t batch, int64_t count, int64_t k, int64_t logits_stride);

/* The noise alone: [rows, elements] contiguous. stream and offset from 0 to 2^32 - 1: independent noises under a seed. */
ICSEG_API int icseg_gumbel_noise(float* noise, int64_t rows, int64_t elements, uint64_t seed, int64_t stream,
                                 int64_t offset);

/* Maps and the windows on them that a draw chooses from: zero padding, the maximum over every window, rescaling of a
 * map's maxima to [0, 1], a separable blur with zeros outside, every stride-th window, division by the temperature.
 * Pixels of NaN and -inf count as their map's lowest finite one, inf as its highest.
 */
struct icseg_windows {
    int64_t batch, height, width;               /* maps [batch, height, width] ... */
    int64_t stride_batch, stride_y, stride_x;   /* ... with these strides */
    int64_t patch, stride;
    int64_t before, after;                      /* zeros around a map, on both axes */
    const void* taps;                           /* tap_count elements of the maps' type; not read if that is 1 */
    int64_t tap_count;                          /* odd; 1 is no blur */
    double temperature;
    int64_t threads;                            /* into how many parts a map's work may be divided, at least 1 */
};

/* The bytes of workspace that the functions below need for elements of 4 or 8 bytes. k is 0 but for
 * icseg_sample_patches, backward 0 but for icseg_window_logits_backward. A workspace is aligned to 64 bytes. */
ICSEG_API int icseg_sample_patches_workspace(const struct icseg_windows* windows, int64_t element_bytes, int64_t k,
                                             int64_t backward, int64_t* bytes);

/* Draw k windows of each map, as icseg_gumbel_topk draws from their logits.
 *
 * noise       [batch, candidates], rows noise_stride apart, or NULL; with seeded != 0 the library's own under `seed`
 * indices     [batch, k] contiguous, row-major over the windows, and scores likewise; -1 and -inf where none was left
 * coords      [batch, k, 2] contiguous: (y, x) of a window's corner in pixels of the unpadded map, -2^30 where none
 */
ICSEG_API int icseg_sample_patches_f32(const struct icseg_windows* windows, const float* maps, const float* noise,
                                       int64_t noise_stride, int64_t k, int64_t seeded, uint64_t seed,
                                       int64_t* indices, float* scores, int32_t* coords, float* workspace,
                                       int64_t workspace_bytes);
ICSEG_API int icseg_sample_patches_f64(const struct icseg_windows* windows, const double* maps, const double* noise,
                                       int64_t noise_stride, int64_t k, int64_t seeded, uint64_t seed,
                                       int64_t* indices, double* scores, int32_t* coords, double* workspace,
                                       int64_t workspace_bytes);

/* The logits that it draws from: [batch, candidates] contiguous. */
ICSEG_API int icseg_window_logits_f32(const struct icseg_windows* windows, const float* maps, float* logits,
                                      float* workspace, int64_t workspace_bytes);
ICSEG_API int icseg_window_logits_f64(const struct icseg_windows* windows, const double* maps, double* logits,
                                      double* workspace, int64_t workspace_bytes);

/* The gradient of those logits to the maps: through a maximum to the first pixel that attains it, through the extremes
 * in equal shares to all that do.
 *
 * grad_logits [batch, candidates] contiguous
 * grad_maps   [batch, height, width] contiguous, every element written
 */
ICSEG_API int icseg_window_logits_backward_f32(const struct icseg_windows* windows, const float* maps,
                                               const float* grad_logits, float* grad_maps, float* workspace,
                                               int64_t workspace_bytes);
ICSEG_API int icseg_window_logits_backward_f64(const struct icseg_windows* windows, const double* maps,
                                               const double* grad_logits, double* grad_maps, double* workspace,
                                               int64_t workspace_bytes);

#ifdef __cplusplus
}
#endif

#endif
