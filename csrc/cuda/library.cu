// What the library says of itself.
#include "launch.cuh"

#define ICSEG_TEXT_(x) #x
#define ICSEG_TEXT(x) ICSEG_TEXT_(x)

int icseg_cuda_abi_version(void) { return ICSEG_CUDA_ABI_VERSION; }

const char* icseg_cuda_build(void) {
    return "nvcc " ICSEG_TEXT(__CUDACC_VER_MAJOR__) "." ICSEG_TEXT(__CUDACC_VER_MINOR__) "." ICSEG_TEXT(
        __CUDACC_VER_BUILD__) ", CUDA runtime " ICSEG_TEXT(CUDART_VERSION);
}

int icseg_cuda_driver(void) {
    int version = 0;
    const bool asked = cudaDriverGetVersion(&version) == cudaSuccess;
    // A driver runs what any runtime of its major version was linked into.
    return asked && version / 1000 >= CUDART_VERSION / 1000 ? ICSEG_CUDA_OK : ICSEG_CUDA_DRIVER;
}

const char* icseg_cuda_error(int code) {
    switch (code) {
        case ICSEG_CUDA_OK: return "no error";
        case ICSEG_CUDA_NEGATIVE_SIZE: return "a size is negative";
        case ICSEG_CUDA_DRAWS: return "more draws than candidates";
        case ICSEG_CUDA_TOO_LARGE: return "sizes beyond the library's limits";
        case ICSEG_CUDA_WINDOWS: return "windows that do not fit the padded map, or an even number of taps";
        case ICSEG_CUDA_DRIVER: return "no CUDA driver, or one older than CUDA " ICSEG_TEXT(__CUDACC_VER_MAJOR__);
    }
    if (code > ICSEG_CUDA_RUNTIME) return cudaGetErrorString(static_cast<cudaError_t>(code - ICSEG_CUDA_RUNTIME));
    return "unknown error code";
}
