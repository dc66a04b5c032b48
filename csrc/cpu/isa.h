// Which instruction set serves a call, and how an entry reaches its kernel.
//
// The kernels (csrc/cpu/kernels/*.cpp) are compiled once an instruction set, each time into the namespace
// ICSEG_ISA; the entries (csrc/cpu/*.cpp) are compiled once and hold no arithmetic. A kernel file keeps everything
// but its kernels in an unnamed namespace and uses no templates of the standard library: of a function that the
// linker may merge, the wide copy could end up in a call that must run on a narrow machine.
#pragma once

namespace icseg {

enum class Isa { portable, avx2, avx512 };

// The one in use: the widest that the machine has, or the one that icseg_select_isa chose.
Isa isa();

// How many threads a call may use: OpenMP's number, or 1 in a child process, where OpenMP's threads do not exist.
int threads();

}  // namespace icseg

#ifdef __x86_64__
// Declares a kernel of every instruction set: ICSEG_KERNEL(void blur(const Map& map, float* out)).
#define ICSEG_KERNEL(signature)       \
    namespace portable { signature; } \
    namespace avx2 { signature; }     \
    namespace avx512 { signature; }
// That kernel for the instruction set in use: ICSEG_CHOSEN(blur)(map, out). Also of templates: ICSEG_CHOSEN(add<float>).
#define ICSEG_CHOSEN(...)                             \
    (::icseg::isa() == ::icseg::Isa::avx512 ? avx512::__VA_ARGS__ \
     : ::icseg::isa() == ::icseg::Isa::avx2 ? avx2::__VA_ARGS__   \
                                            : portable::__VA_ARGS__)
#else
#define ICSEG_KERNEL(signature) \
    namespace portable { signature; }
#define ICSEG_CHOSEN(...) portable::__VA_ARGS__
#endif
