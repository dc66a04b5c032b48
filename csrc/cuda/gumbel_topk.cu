// gumbel_topk: drawing without replacement, a row by one block, and its gradient.
#include "checks.h"
#include "draw.cuh"

namespace icseg_cuda {
namespace {

struct DrawArguments {
    const float* logits;
    const float* noise;
    const int64_t* seed;
    int64_t* indices;
    float* scores;
    float* logsumexp;
    float* kappa;
    int64_t* kappa_index;
    int count, k, capacity;
    int64_t logits_stride, noise_stride;
    bool seeded;
    uint64_t seed_value;
};

template <int kThreads, int kGroups, bool kChunks>
__global__ void __launch_bounds__(kThreads, 1) draw_kernel(const DrawArguments a) {
    uint64_t* keys = reinterpret_cast<uint64_t*>(shared_memory());
    DrawScratch& scratch = *reinterpret_cast<DrawScratch*>(keys + a.capacity);
    const int64_t b = blockIdx.x;
    const Row row(a.logits + b * a.logits_stride, a.count);
    const Noise noise{a.noise == nullptr ? nullptr : a.noise + b * a.noise_stride, a.seeded,
                      a.seeded && a.seed != nullptr ? static_cast<uint64_t>(*a.seed) : a.seed_value, blockIdx.x};
    const int most = a.k < a.count ? a.k + 1 : a.k;
    const Summary sum = summarise<kThreads>(row, scratch);
    if (threadIdx.x == 0) a.logsumexp[b] = sum.logsumexp;
    const float guess = a.seeded ? likely_floor(sum, most) : minus_infinity();
    const int found = draw<kThreads, kGroups, kChunks>(row, noise, most, guess, scratch, keys, a.capacity);
    for (int j = threadIdx.x; j <= a.k; j += kThreads) {
        int64_t index;
        float score;
        drawn(row, noise, keys, found, j, &index, &score);
        if (j < a.k) {
            a.indices[b * a.k + j] = index;
            a.scores[b * a.k + j] = score;
        } else {
            a.kappa_index[b] = index;
            a.kappa[b] = score;
        }
    }
}

struct GradientArguments {
    const float* logits;
    const int64_t* indices;
    const int64_t* kappa_index;
    const float* logsumexp;
    const float* grad_scores;
    const float* grad_logsumexp;
    const float* grad_kappa;
    float* grad;
    int64_t count, k, logits_stride;
};

constexpr int kGradientThreads = 1024;

__global__ void __launch_bounds__(kGradientThreads) gradient_kernel(const GradientArguments a) {
    const int64_t b = blockIdx.x;
    float* grad = a.grad + b * a.count;
    if (a.grad_logsumexp == nullptr) {
        for (int64_t i = threadIdx.x; i < a.count; i += kGradientThreads) grad[i] = 0;
    } else {
        const float* logits = a.logits + b * a.logits_stride;
        const float sum = a.logsumexp[b], scale = a.grad_logsumexp[b];
        for (int64_t i = threadIdx.x; i < a.count; i += kGradientThreads) {
            const float x = logits[i] - sum;
            grad[i] = (x == x ? expf(x) : 0.0f) * scale;
        }
    }
    __syncthreads();
    // No element is drawn twice.
    for (int64_t j = threadIdx.x; j <= a.k; j += kGradientThreads) {
        const int64_t index = j < a.k ? a.indices[b * a.k + j] : a.kappa_index[b];
        if (index < 0 || index >= a.count) continue;
        grad[index] += j < a.k ? a.grad_scores[b * a.k + j] : a.grad_kappa[b];
    }
}

}  // namespace
}  // namespace icseg_cuda

int icseg_cuda_gumbel_topk_f32(const float* logits, const float* noise, const int64_t* seed, int64_t* indices,
                               float* scores, float* logsumexp, float* kappa, int64_t* kappa_index, int64_t batch,
                               int64_t count, int64_t k, int64_t logits_stride, int64_t noise_stride, int64_t seeded,
                               uint64_t seed_value, void* stream) {
    using namespace icseg_cuda;
    const int64_t most = k < count ? k + 1 : k;
    if (const int code = checked_draw(batch, count, k, most)) return code;
    const int capacity = draw_capacity(most);
    const int bytes = capacity * static_cast<int>(sizeof(uint64_t)) + static_cast<int>(sizeof(DrawScratch));
    const DrawArguments a{logits, noise, seed, indices, scores, logsumexp, kappa, kappa_index, static_cast<int>(count),
                          static_cast<int>(k), capacity, logits_stride, noise_stride, seeded != 0, seed_value};
    if (count <= 1024) return launch(draw_kernel<256, 1, false>, batch, 256, bytes, stream, a);
    if (count <= 4096) return launch(draw_kernel<512, 2, false>, batch, 512, bytes, stream, a);
    return launch(draw_kernel<1024, 4, true>, batch, 1024, bytes, stream, a);
}

int icseg_cuda_gumbel_topk_backward_f32(const float* logits, const int64_t* indices, const int64_t* kappa_index,
                                        const float* logsumexp, const float* grad_scores, const float* grad_logsumexp,
                                        const float* grad_kappa, float* grad, int64_t batch, int64_t count, int64_t k,
                                        int64_t logits_stride, void* stream) {
    using namespace icseg_cuda;
    if (const int code = checked_draw(batch, count, k, 0)) return code;
    const GradientArguments a{logits,         indices,    kappa_index, logsumexp, grad_scores,
                              grad_logsumexp, grad_kappa, grad,        count,     k,           logits_stride};
    return launch(gradient_kernel, batch, kGradientThreads, 0, stream, a);
}
