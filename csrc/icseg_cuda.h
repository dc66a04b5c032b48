/* icseg CUDA library: plain C ABI, no Python and no torch; it loads on machines without a GPU.
 *
 * Pointers are to device memory unless said otherwise, and `stream` is a cudaStream_t of the current device. A call
 * only launches: it neither waits nor allocates, so that a CUDA graph may capture it, and it returns 0, one of the
 * codes below or ICSEG_CUDA_RUNTIME plus a cudaError. Having failed, it has launched nothing. Sizes count elements,
 * all of them int64. Results are the same bits in every run; of the float32 arithmetic of scores, every operation is
 * rounded by itself, so that they equal those of icseg.h.
 */
#ifndef ICSEG_CUDA_H
#define ICSEG_CUDA_H

#include <stdint.h>

#define ICSEG_CUDA_API __attribute__((visibility("default")))

/* Raised with every change to a signature or a meaning below. */
#define ICSEG_CUDA_ABI_VERSION 1

/* Limits, beyond which a call is refused with ICSEG_CUDA_TOO_LARGE. */
#define ICSEG_CUDA_MOST_DRAWS 4096   /* min(k + 1, count) of a draw */
#define ICSEG_CUDA_MOST_PIXELS 20480 /* of a padded map */
#define ICSEG_CUDA_MOST_TAPS 127     /* of a blur */

enum icseg_cuda_code {
    ICSEG_CUDA_OK = 0,
    ICSEG_CUDA_NEGATIVE_SIZE = 1,
    ICSEG_CUDA_DRAWS = 2,
    ICSEG_CUDA_TOO_LARGE = 3,
    ICSEG_CUDA_WINDOWS = 4,
    ICSEG_CUDA_DRIVER = 5,
    ICSEG_CUDA_RUNTIME = 1000,
};

#ifdef __cplusplus
extern "C" {
#endif

ICSEG_CUDA_API int icseg_cuda_abi_version(void);

/* The version of nvcc and of the CUDA runtime that is linked in, for bug reports. */
ICSEG_CUDA_API const char* icseg_cuda_build(void);

/* ICSEG_CUDA_DRIVER if this machine has no CUDA driver, or one too old for the library. Touches no device. */
ICSEG_CUDA_API int icseg_cuda_driver(void);

/* One sentence for a code that a call returned. */
ICSEG_CUDA_API const char* icseg_cuda_error(int code);

/* Draw k of count elements of each row without replacement: the k largest of logits + noise, descending, equal ones by
 * ascending index. The noise is `noise`, or with seeded != 0 the library's own under *seed, or `seed_value` where seed
 * is NULL, or none.
 *
 * logits      [batch, count], rows logits_stride apart, count < 2^31; -inf and NaN are never drawn
 * noise       [batch, count], rows noise_stride apart, or NULL
 * indices     [batch, k] contiguous, and scores likewise: the element and its logit + noise; -1 and -inf where none
 *             was left
 * logsumexp   [batch] of the logits
 * kappa       [batch] the (k + 1)-th score, and its element in kappa_index; -inf and -1 where there is none
 */
ICSEG_CUDA_API int icseg_cuda_gumbel_topk_f32(const float* logits, const float* noise, const int64_t* seed,
                                              int64_t* indices, float* scores, float* logsumexp, float* kappa,
                                              int64_t* kappa_index, int64_t batch, int64_t count, int64_t k,
                                              int64_t logits_stride, int64_t noise_stride, int64_t seeded,
                                              uint64_t seed_value, void* stream);

/* Its gradient: grad_scores and grad_kappa at their elements, plus grad_logsumexp times softmax(logits).
 *
 * logits      [batch, count], rows logits_stride apart; indices, kappa_index, logsumexp as the draw gave them: an
 *             index outside 0 <= index < count is skipped
 * grad_*      contiguous; with grad_logsumexp NULL, logits and logsumexp are not read: the gradient of the noise
 * grad        [batch, count] contiguous, every element written
 */
ICSEG_CUDA_API int icseg_cuda_gumbel_topk_backward_f32(const float* logits, const int64_t* indices,
                                                       const int64_t* kappa_index, const float* logsumexp,
                                                       const float* grad_scores, const float* grad_logsumexp,
                                                       const float* grad_kappa, float* grad, int64_t batch,
                                                       int64_t count, int64_t k, int64_t logits_stride, void* stream);

/* Maps and the windows on them that a draw chooses from: zero padding, the maximum over every window, rescaling of a
 * map's maxima to [0, 1], a separable blur with zeros outside, every stride-th window, division by the temperature.
 * Pixels of NaN and -inf count as their map's lowest finite one, inf as its highest. In host memory.
 */
struct icseg_cuda_windows {
    int64_t batch, height, width;             /* maps [batch, height, width] ... */
    int64_t stride_batch, stride_y, stride_x; /* ... with these strides */
    int64_t patch, stride;
    int64_t before, after;                    /* zeros around a map, on both axes */
    const float* taps;                        /* tap_count of them, in host memory; not read if that is 1 */
    int64_t tap_count;                        /* odd; 1 is no blur */
    const double* temperature;                /* in device memory; NULL: temperature_value */
    double temperature_value;
};

/* Draw k windows of each map, as icseg_cuda_gumbel_topk_f32 draws from their logits.
 *
 * noise       [batch, candidates], rows noise_stride apart, or NULL
 * indices     [batch, k] contiguous, row-major over the windows, and scores likewise; -1 and -inf where none was left
 * coords      [batch, k, 2] contiguous: (y, x) of a window's corner in pixels of the unpadded map, -2^30 where none
 */
ICSEG_CUDA_API int icseg_cuda_sample_patches_f32(const struct icseg_cuda_windows* windows, const float* maps,
                                                 const float* noise, int64_t noise_stride, const int64_t* seed,
                                                 int64_t k, int64_t seeded, uint64_t seed_value, int64_t* indices,
                                                 float* scores, int32_t* coords, void* stream);

#ifdef __cplusplus
}
#endif

#endif
