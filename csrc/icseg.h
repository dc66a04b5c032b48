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
    ICSEG_WORKSPACE = 7,
    ICSEG_RUNS = 8,
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

#ifdef __cplusplus
}
#endif

#endif
