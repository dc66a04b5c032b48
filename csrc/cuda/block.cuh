// Sums and maxima over a block's threads, in an order that depends on their number alone.
#pragma once

#include "launch.cuh"

namespace icseg_cuda {

constexpr int kWarp = 32;
constexpr unsigned kEveryLane = 0xFFFFFFFFu;

// join(values of all kThreads threads), in every thread. `scratch` holds kWarp values.
template <int kThreads, typename Join>
__device__ float reduce(float value, float* scratch, const Join& join) {
    for (int step = kWarp / 2; step > 0; step /= 2) value = join(value, __shfl_xor_sync(kEveryLane, value, step));
    const int lane = threadIdx.x % kWarp;
    if (lane == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    constexpr int kWarps = kThreads / kWarp;
    value = scratch[lane % kWarps];
    for (int step = kWarps / 2; step > 0; step /= 2) value = join(value, __shfl_xor_sync(kEveryLane, value, step));
    __syncthreads();
    return value;
}

struct Larger {
    __device__ float operator()(float a, float b) const { return b > a ? b : a; }
};
struct Smaller {
    __device__ float operator()(float a, float b) const { return b < a ? b : a; }
};
struct Plus {
    __device__ float operator()(float a, float b) const { return a + b; }
};

// The sum of `value` over the lanes below, and over all of them in *total.
__device__ __forceinline__ int sum_below(int value, int* total) {
    const int lane = threadIdx.x % kWarp;
    int sum = value;
    for (int step = 1; step < kWarp; step *= 2) {
        const int other = __shfl_up_sync(kEveryLane, sum, step);
        if (lane >= step) sum += other;
    }
    *total = __shfl_sync(kEveryLane, sum, kWarp - 1);
    return sum - value;
}

}  // namespace icseg_cuda
