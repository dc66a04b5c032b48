// What the library says of itself, and what serves a call: the instruction set and the threads.
#include "../icseg.h"
#include "isa.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

#include <pthread.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define ICSEG_TEXT_(x) #x
#define ICSEG_TEXT(x) ICSEG_TEXT_(x)

#ifdef _OPENMP
#define ICSEG_OPENMP "OpenMP " ICSEG_TEXT(_OPENMP)
#else
#define ICSEG_OPENMP "no OpenMP"
#endif

#ifdef __clang__
#define ICSEG_COMPILER __VERSION__
#else
#define ICSEG_COMPILER "GCC " __VERSION__
#endif

namespace icseg {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

Isa widest() {
#ifdef __x86_64__
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
#else
    return Isa::portable;
#endif
}

// OpenMP keeps its threads between calls; fork copies none of them, and the next parallel region would wait for
// them for ever.
std::atomic<bool> forked{false};
const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

const Isa native = widest();
std::atomic<Isa> chosen{native};

}  // namespace

Isa isa() { return chosen.load(std::memory_order_relaxed); }

int threads() {
#ifdef _OPENMP
    return forked.load(std::memory_order_relaxed) ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

}  // namespace icseg

int icseg_abi_version(void) { return ICSEG_ABI_VERSION; }

const char* icseg_build(void) { return ICSEG_COMPILER ", " ICSEG_OPENMP; }

int icseg_threads(void) { return icseg::threads(); }

const char* icseg_isa(void) { return icseg::kNames[static_cast<int>(icseg::isa())]; }

int icseg_select_isa(const char* name) {
    using icseg::Isa;
    if (name == nullptr) {
        icseg::chosen = icseg::native;
        return ICSEG_OK;
    }
    for (const Isa candidate : {Isa::portable, Isa::avx2, Isa::avx512}) {
        if (std::strcmp(name, icseg::kNames[static_cast<int>(candidate)]) != 0) continue;
        if (candidate > icseg::native) return ICSEG_ISA_MISSING;
        icseg::chosen = candidate;
        return ICSEG_OK;
    }
    return ICSEG_ISA_UNKNOWN;
}

const char* icseg_error(int code) {
    switch (code) {
        case ICSEG_OK: return "no error";
        case ICSEG_NEGATIVE_SIZE: return "sizes must not be negative";
        case ICSEG_PATCH_SIZE: return "patch must be at least 1";
        case ICSEG_ELEMENT_BYTES: return "element_bytes must be 1, 2, 4 or 8";
        case ICSEG_TOO_LARGE: return "sizes must not multiply beyond 63 bits of bytes";
        case ICSEG_ISA_UNKNOWN: return "the instruction set must be portable, avx2 or avx512";
        case ICSEG_ISA_MISSING: return "this machine has no such instruction set";
        case ICSEG_COORDS_TYPE: return "coords_type must be that of integers, or of floats where patches are resampled";
        case ICSEG_DRAWS: return "draws must not outnumber the elements";
        case ICSEG_GROUPS: return "groups must be at least 1 and divide the channels";
        case ICSEG_ACTIVATION: return "activation must be from 0 to 3";
        case ICSEG_WORKSPACE: return "the workspace must be larger";
        case ICSEG_WINDOWS: return "a window must fit the map, its stride and the threads be positive, the taps an odd number";
        case ICSEG_RUNS: return "runs must add up to the queries, cover whole groups and stay within the lists";
        case ICSEG_LAYERS:
            return "layers must be 1 to 16 convolutions, each of the channels that the one before gives, of kernels 1 to 5, "
                   "strides 1 or 2, paddings below the kernel, and maps of 1 to 128 channels and 1 to 32 pixels a side";
        case ICSEG_BLOCK:
            return "a block must have 1 to 512 channels, heads that divide them, and 1 to 2048 hidden channels";
        case ICSEG_HALVINGS: return "deviations must not outnumber the halvings";
        case ICSEG_DOUBLE: return "height and width must be twice those of the coarser map, or one less";
        default: return "unknown error code";
    }
}
