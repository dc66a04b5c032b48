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
#define ICSEG_ABI_VERSION 4

enum icseg_code {
    ICSEG_OK = 0,
    ICSEG_NEGATIVE_SIZE = 1,
    ICSEG_PATCH_SIZE = 2,
    ICSEG_ELEMENT_BYTES = 3,
    ICSEG_TOO_LARGE = 4,
    ICSEG_ISA_UNKNOWN = 5,
    ICSEG_ISA_MISSING = 6,
    ICSEG_COORDS_TYPE = 7,
    ICSEG_DRAWS = 8,
    ICSEG_WORKSPACE = 9,
    ICSEG_GROUPS = 10,
    ICSEG_ACTIVATION = 11,
    ICSEG_WINDOWS = 12,
    ICSEG_RUNS = 13,
    ICSEG_LAYERS = 14,
    ICSEG_BLOCK = 15,
    ICSEG_HALVINGS = 16,
    ICSEG_DOUBLE = 17,
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

/* The type of coordinates. */
enum icseg_coords {
    ICSEG_COORDS_INT32 = 0,
    ICSEG_COORDS_INT64 = 1,
    ICSEG_COORDS_FLOAT32 = 2,
    ICSEG_COORDS_FLOAT64 = 3,
};

/* Cut patches out of images: an exact copy, zero outside the image.
 *
 * source   [outer, inner, channels, height, width], strides given, elements of element_bytes = 1, 2, 4 or 8
 * coords   [outer, inner, count, 2] contiguous integers: (y, x) of a patch's top-left corner, any value
 * patches  [outer, inner, count, channels, patch, patch] contiguous, every element written
 */
ICSEG_API int icseg_gather_patches(const void* source, const void* coords, void* patches,
                                   int64_t outer, int64_t inner, int64_t channels, int64_t height, int64_t width,
                                   int64_t count, int64_t patch,
                                   int64_t stride_outer, int64_t stride_inner, int64_t stride_channel,
                                   int64_t stride_y, int64_t stride_x, int64_t element_bytes, int coords_type);

/* Its adjoint: add patches up into images, in the order of count; what lies outside is dropped.
 *
 * patches  [outer, inner, count, channels, patch, patch], strides given
 * coords   [outer, inner, count, 2] contiguous integers
 * images   [outer, inner, channels, height, width] contiguous, every element written
 */
ICSEG_API int icseg_gather_patches_backward_f32(const float* patches, const void* coords, float* images,
                                                int64_t outer, int64_t inner, int64_t count, int64_t channels,
                                                int64_t patch, int64_t height, int64_t width,
                                                int64_t stride_outer, int64_t stride_inner, int64_t stride_count,
                                                int64_t stride_channel, int64_t stride_y, int64_t stride_x,
                                                int coords_type);
ICSEG_API int icseg_gather_patches_backward_f64(const double* patches, const void* coords, double* images,
                                                int64_t outer, int64_t inner, int64_t count, int64_t channels,
                                                int64_t patch, int64_t height, int64_t width,
                                                int64_t stride_outer, int64_t stride_inner, int64_t stride_count,
                                                int64_t stride_channel, int64_t stride_y, int64_t stride_x,
                                                int coords_type);

/* Resample patches of images bilinearly, borders replicated; zero for a patch wholly outside, or at NaN.
 *
 * A patch covers extent_y x extent_x > 0 pixels from its corner. Of its samples x samples samples, number i lies along
 * an axis at corner + (i + 1/2) extent / samples - 1/2, in pixels from the first pixel's centre; with edge_to_edge
 * at corner + extent / 2 - 1/2 + extent * line(i), `line` from -1/2 to 1/2 in equal steps (one sample: -1/2).
 *
 * source   [outer, inner, channels, height, width], strides given
 * coords   [outer, inner, count, 2] contiguous, any type, any value
 * patches  [outer, inner, count, channels, samples, samples] contiguous, every element written
 */
ICSEG_API int icseg_gather_patches_bilinear_f32(const float* source, const void* coords, float* patches,
                                                int64_t outer, int64_t inner, int64_t channels, int64_t height,
                                                int64_t width, int64_t count, int64_t samples,
                                                int64_t stride_outer, int64_t stride_inner, int64_t stride_channel,
                                                int64_t stride_y, int64_t stride_x, int coords_type,
                                                double extent_y, double extent_x, int edge_to_edge);
ICSEG_API int icseg_gather_patches_bilinear_f64(const double* source, const void* coords, double* patches,
                                                int64_t outer, int64_t inner, int64_t channels, int64_t height,
                                                int64_t width, int64_t count, int64_t samples,
                                                int64_t stride_outer, int64_t stride_inner, int64_t stride_channel,
                                                int64_t stride_y, int64_t stride_x, int coords_type,
                                                double extent_y, double extent_x, int edge_to_edge);

/* Its adjoint, added up in an order that depends on the sizes alone.
 *
 * patches  [outer, inner, count, channels, samples, samples], strides given
 * coords   [outer, inner, count, 2] contiguous, any type
 * images   [outer, inner, channels, height, width] contiguous, every element written
 */
ICSEG_API int icseg_gather_patches_bilinear_backward_f32(
    const float* patches, const void* coords, float* images, int64_t outer, int64_t inner, int64_t count,
    int64_t channels, int64_t samples, int64_t height, int64_t width, int64_t stride_outer, int64_t stride_inner,
    int64_t stride_count, int64_t stride_channel, int64_t stride_y, int64_t stride_x, int coords_type,
    double extent_y, double extent_x, int edge_to_edge);
ICSEG_API int icseg_gather_patches_bilinear_backward_f64(
    const double* patches, const void* coords, double* images, int64_t outer, int64_t inner, int64_t count,
    int64_t channels, int64_t samples, int64_t height, int64_t width, int64_t stride_outer, int64_t stride_inner,
    int64_t stride_count, int64_t stride_channel, int64_t stride_y, int64_t stride_x, int coords_type,
    double extent_y, double extent_x, int edge_to_edge);

/* Write patches into images: the weighted mean where they overlap, in the order of count, `fill` where none lies.
 *
 * patches   [batch, count, channels, patch, patch], strides given
 * coords    [batch, count, 2] contiguous: (y, x) of a patch's top-left corner, any value; int32 if coords_are_32_bits
 *           is not 0, else int64
 * weight    [patch, patch] contiguous, or NULL: all ones. Where it is not positive a patch covers nothing.
 * mean      [batch, channels, height, width] contiguous, every element written
 * total     [batch, height, width] contiguous, every element written: the sum of the weights; NULL: not wanted
 * coverage  [batch, height, width] contiguous, every element written: 1 where total is positive, else 0
 *
 * bf16: patches and mean are bfloat16; weight, total and the sums float32.
 */
#define ICSEG_SCATTER_PATCHES(name, stored, sum)                                                                   \
    ICSEG_API int name(const stored* patches, const void* coords, const sum* weight, stored* mean, sum* total,     \
                       uint8_t* coverage, double fill, int64_t batch, int64_t count, int64_t channels,             \
                       int64_t patch, int64_t height, int64_t width, int64_t stride_batch, int64_t stride_count,   \
                       int64_t stride_channel, int64_t stride_y, int64_t stride_x, int64_t coords_are_32_bits)
ICSEG_SCATTER_PATCHES(icseg_scatter_patches_f32, float, float);
ICSEG_SCATTER_PATCHES(icseg_scatter_patches_f64, double, double);
ICSEG_SCATTER_PATCHES(icseg_scatter_patches_bf16, uint16_t, float);

/* Its adjoint with respect to the patches.
 *
 * grad     [batch, channels, height, width], strides given
 * total    as written forward
 * patches  [batch, count, channels, patch, patch] contiguous, every element written
 */
#define ICSEG_SCATTER_PATCHES_BACKWARD(name, stored, sum)                                                          \
    ICSEG_API int name(const stored* grad, const sum* total, const void* coords, const sum* weight,                \
                       stored* patches, int64_t batch, int64_t count, int64_t channels, int64_t patch,             \
                       int64_t height, int64_t width, int64_t stride_batch, int64_t stride_channel,                \
                       int64_t stride_y, int64_t stride_x, int64_t coords_are_32_bits)
ICSEG_SCATTER_PATCHES_BACKWARD(icseg_scatter_patches_backward_f32, float, float);
ICSEG_SCATTER_PATCHES_BACKWARD(icseg_scatter_patches_backward_f64, double, double);
ICSEG_SCATTER_PATCHES_BACKWARD(icseg_scatter_patches_backward_bf16, uint16_t, float);

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

/* The tail of a convolution of pairs: z[b, i, j] = activation(zx[b, i] + zy[b, j]), and its mean over j.
 *
 * zx, zy     [batch, xs, length], [batch, ys, length] contiguous
 * pairs      [batch, xs, ys, length] contiguous, every element written, or NULL; it may be zy where xs is 1
 * mean       [batch, xs, length] contiguous, every element written if ys > 0, added up in the order of j, or NULL;
 *            the same bits with and without pairs, but for which NaN a NaN is
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

/* The gradient of the logits [batch, candidates] that it draws from to the maps: through a maximum to the first pixel that attains it, through the extremes
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

/* A tensor [batch, heads, rows, columns], strides given; data NULL: none. */
typedef struct icseg_heads {
    const void* data;
    int64_t stride_batch, stride_head, stride_row, stride_column;
} icseg_heads;

/* Attention of queries over the keys that a list names; all fields are 8 bytes wide.
 *
 * q [batch, heads, queries, dim], k [batch, heads, keys, dim], v [batch, heads, keys, value_dim]
 * q_cos, q_sin [batch, heads, queries, dim / 2], k_cos, k_sin [batch, heads, keys, dim / 2], or none: consecutive pairs
 *          of columns of q and k are turned, (a, b) -> (a cos - b sin, a sin + b cos); dim is then even
 * index    [batch, groups, listed] rows of k and v, integers of index_bytes = 4 or 8; those outside [0, keys) are no
 *          keys. A list is for queries / groups consecutive queries. index_bytes = 0: groups = 1, and the first `listed`
 *          rows are listed, in order
 * sink     not 0: there is one more key of zeros, with a value of zeros
 * slots    how many shares the work is cut into, at least 1: as many as threads that may serve it
 */
typedef struct icseg_attention {
    icseg_heads q, k, v, q_cos, q_sin, k_cos, k_sin;
    const void* index;
    int64_t index_bytes, stride_index_batch, stride_index_group, stride_index_entry;
    int64_t batch, heads, queries, keys, dim, value_dim, groups, listed;
    int64_t sink;
    double scale;
    void* workspace;
    int64_t workspace_bytes, slots;
} icseg_attention;

/* *bytes of workspace that a call needs, with `runs` runs of queries and elements of element_bytes. */
ICSEG_API int icseg_selected_attention_workspace(int64_t batch, int64_t heads, int64_t queries, int64_t dim,
                                                 int64_t value_dim, int64_t groups, int64_t listed, int64_t indexed,
                                                 int64_t runs, int64_t slots, int64_t element_bytes, int64_t backward,
                                                 int64_t* bytes);

/* out  [batch, queries, heads, value_dim] contiguous: softmax(scale q k^T) v; 0 where a query has no key
 * lse  [batch, heads, queries] contiguous: log(sum(exp(scale q k^T)))
 * runs [run_count, 2]: as many queries, in order, attend to the first so many entries of their lists; they add up to
 *      queries and cover whole groups, if groups > 1. None (0): all queries, whole lists.
 */
ICSEG_API int icseg_selected_attention_f32(const icseg_attention* call, const int64_t* runs, int64_t run_count,
                                           float* out, float* lse);
ICSEG_API int icseg_selected_attention_f64(const icseg_attention* call, const int64_t* runs, int64_t run_count,
                                           double* out, double* lse);

/* Gradients [batch, heads, rows, columns] contiguous of q, k and v, from those of out and of lse.
 *
 * out, grad_out  [batch, heads, queries, value_dim], strides given
 * lse            [batch, heads, queries] contiguous, as the forward function wrote it; grad_lse the same, or NULL
 */
ICSEG_API int icseg_selected_attention_backward_f32(const icseg_attention* call, const int64_t* runs,
                                                    int64_t run_count, const icseg_heads* out,
                                                    const icseg_heads* grad_out, const float* lse,
                                                    const float* grad_lse, float* grad_q, float* grad_k,
                                                    float* grad_v);
ICSEG_API int icseg_selected_attention_backward_f64(const icseg_attention* call, const int64_t* runs,
                                                    int64_t run_count, const icseg_heads* out,
                                                    const icseg_heads* grad_out, const double* lse,
                                                    const double* grad_lse, double* grad_q, double* grad_k,
                                                    double* grad_v);

/* One of several convolutions in a row; all fields are 8 bytes wide.
 *
 * weight   [out_channels, in_channels, kernel, kernel] contiguous; kernel from 1 to 5
 * bias     [out_channels] contiguous, or NULL: zeros
 * stride   1 or 2, on both axes
 * padding  0 to kernel - 1 pixels on all four sides: zeros, or if replicate is not 0 the nearest pixel of the border
 * slope    of the leaky ReLU that follows; 1: none
 */
typedef struct icseg_convolution {
    const float* weight;
    const float* bias;
    int64_t in_channels, out_channels, kernel, stride, padding, replicate;
    double slope;
} icseg_convolution;

/* *bytes of workspace that a call needs whose images are height x width; reads no weights. All maps, x and the outputs of
 * layers, may have up to 128 channels and 32 x 32 pixels; there may be up to 16 layers.
 *
 * slots    how many shares the work is cut into, at least 1: as many as threads that may serve it
 */
ICSEG_API int icseg_small_convolutions_workspace(const icseg_convolution* layers, int64_t count, int64_t height,
                                                 int64_t width, int64_t slots, int64_t* bytes);

/* Convolve small images, one layer after the other.
 *
 * x    [images, in_channels of the first layer, height, width], strides given
 * out  [images, out_channels of the last layer, ...] contiguous, every element written
 */
ICSEG_API int icseg_small_convolutions_f32(const float* x, const icseg_convolution* layers, int64_t count, float* out,
                                           int64_t images, int64_t height, int64_t width, int64_t stride_image,
                                           int64_t stride_channel, int64_t stride_y, int64_t stride_x, int64_t slots,
                                           void* workspace, int64_t workspace_bytes);

/* Tokens in memory that a block attends to: a key and a value of dim channels each, one after the other. */
typedef struct icseg_block_memory {
    const float* data;
    int64_t tokens, stride_batch, stride_token;
} icseg_block_memory;

/* A pre-norm transformer block whose keys and values are extended by those of other tokens; all fields are 8 bytes
 * wide.
 *
 * x = norm(tokens, norm_attention); q = query x; own = key_value x: the tokens' keys, then their values
 * tokens += out attention(q, memory and own); tokens += mlp_out gelu(mlp_in norm(tokens, norm_mlp))
 *
 * weights  [outputs, inputs] contiguous, biases [outputs]; dim from 1 to 512, heads divides it, hidden from 1 to 2048
 * tokens   [batch, count, dim], the channels contiguous
 * index    [batch, listed] of the keys to be seen, integers of index_bytes = 4 or 8; those outside [0, keys) are no
 *          keys. index_bytes = 0: all are seen
 * slots    how many shares the work is cut into, at least 1: as many as threads that may serve it
 */
typedef struct icseg_block {
    const float *norm_attention_weight, *norm_attention_bias, *query_weight, *query_bias;
    const float *key_value_weight, *key_value_bias, *out_weight, *out_bias;
    const float *norm_mlp_weight, *norm_mlp_bias, *mlp_in_weight, *mlp_in_bias, *mlp_out_weight, *mlp_out_bias;
    double eps;
    int64_t dim, heads, hidden;
    const float* tokens;
    int64_t batch, count, stride_batch, stride_token;
    const void* index;
    int64_t index_bytes, listed, stride_index_batch, stride_index_entry;
    void* workspace;
    int64_t workspace_bytes, slots;
} icseg_block;

/* *bytes of workspace that a call needs, where tokens attend to `keys` keys in all, with or without an index. */
ICSEG_API int icseg_transformer_block_workspace(int64_t batch, int64_t count, int64_t dim, int64_t heads,
                                                int64_t hidden, int64_t keys, int64_t listed, int64_t slots,
                                                int64_t* bytes);

/* memory  `pieces` of them; the keys are theirs, in their order, then the tokens' own
 * out     [batch, count, dim] contiguous, every element written: the tokens
 * own     [batch, count, 2 dim] contiguous, every element written: their keys and values
 */
ICSEG_API int icseg_transformer_block_f32(const icseg_block* block, const icseg_block_memory* memory, int64_t pieces,
                                          float* out, float* own);

/* Halve images `count` times: each pixel the mean of the 2 x 2 of before, of those that exist; sizes are rounded up.
 *
 * image       [images, channels, height, width], strides given; the pixels of a row lie side by side
 * means       of every halving, the largest first: [images, channels, ...] contiguous, every element written
 * deviations  of the first `deviating` halvings, likewise: the standard deviation of the pixels of `image` inside each
 *             pixel, at least 1e-6; a last row or column without a partner counts twice in a halving
 * workspace   as many floats as the means of the first deviating - 1 halvings have. Not used (NULL) for deviating < 2.
 */
ICSEG_API int icseg_halvings_f32(const float* image, float* const* means, float* const* deviations, int64_t images,
                                 int64_t channels, int64_t height, int64_t width, int64_t count, int64_t deviating,
                                 int64_t stride_image, int64_t stride_channel, int64_t stride_y, float* workspace,
                                 int64_t workspace_bytes);

/* Double a map bilinearly (pixels are areas, the border is replicated), with patches in place of what lies under them.
 *
 * coarser  [batch, channels, coarse_height, coarse_width], strides given; the pixels of a row lie side by side
 * patches  [batch, count, channels, patch_height, patch_width] contiguous
 * coords   [batch, count, 2] contiguous: (y, x) of a patch's top-left corner, any value; what is outside is dropped
 * out      [batch, channels, height, width] contiguous, every element written; where patches overlap, the last one's.
 *          height and width are twice those of the coarser map, or one less.
 */
ICSEG_API int icseg_upsample_with_patches_f32(const float* coarser, const float* patches, const int64_t* coords,
                                              float* out, int64_t batch, int64_t channels, int64_t coarse_height,
                                              int64_t coarse_width, int64_t height, int64_t width, int64_t count,
                                              int64_t patch_height, int64_t patch_width, int64_t stride_batch,
                                              int64_t stride_channel, int64_t stride_y);

#ifdef __cplusplus
}
#endif

#endif
