// Launching kernels, the only use of the CUDA runtime. csrc/tests/cuda_on_cpu.h stands in for this file in tests.
#pragma once

#ifndef ICSEG_CUDA_ON_CPU

#include <cuda_runtime.h>

#include "../icseg_cuda.h"

#define ICSEG_UNROLL _Pragma("unroll")

namespace icseg_cuda {

constexpr int kSharedBytes = 48 << 10;  // what a block gets without asking

// The shared memory of the block, as many bytes as it was launched with; no kernel has any other.
__device__ __forceinline__ float4* shared_memory() {
    extern __shared__ float4 memory[];
    return memory;
}

// An error code. `blocks` may be 0.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, void* stream,
           const Arguments&... arguments) {
    if (blocks == 0) return ICSEG_CUDA_OK;
    cudaError_t error = cudaSuccess;
    if (shared_bytes > kSharedBytes) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    }
    if (error == cudaSuccess) {
        kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
            arguments...);
        error = cudaGetLastError();
    } else {
        cudaGetLastError();  // so that no later call finds it
    }
    return error == cudaSuccess ? ICSEG_CUDA_OK : ICSEG_CUDA_RUNTIME + static_cast<int>(error);
}

}  // namespace icseg_cuda

#endif
