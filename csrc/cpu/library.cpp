// What the library says of itself.
#include "../icseg.h"

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

int icseg_abi_version(void) { return ICSEG_ABI_VERSION; }

const char* icseg_build(void) { return ICSEG_COMPILER ", " ICSEG_OPENMP; }

int icseg_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

const char* icseg_error(int code) {
    switch (code) {
        case ICSEG_OK: return "no error";
        case ICSEG_NEGATIVE_SIZE: return "sizes must not be negative";
        case ICSEG_PATCH_SIZE: return "patch must be at least 1";
        case ICSEG_ELEMENT_BYTES: return "element_bytes must be 1, 2, 4 or 8";
        case ICSEG_TOO_LARGE: return "sizes must not multiply beyond 63 bits of bytes";
        default: return "unknown error code";
    }
}
