// What csrc/cuda needs of CUDA, on the CPU: a test includes this file, then a .cu source, whose kernels then run here.
//
// Blocks run one after the other. The threads of a block are fibers, which change only where they wait for each other:
// at barriers and where lanes exchange values. In between, warps and lanes take their turns in an order that differs
// each time, so that a missing barrier shows; so does a wait that never ends. Shared memory is full of NaN at first,
// and ends at a page that must not be touched. All lanes must take part where any does.
#pragma once

#undef _FORTIFY_SOURCE  // its longjmp refuses other stacks

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "../icseg_cuda.h"
#include "testing.h"

#define ICSEG_CUDA_ON_CPU
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define ICSEG_UNROLL

struct float4 {
    float x, y, z, w;
};

namespace on_cpu {

struct Index {
    unsigned x;
};
inline thread_local Index threadIdx, blockIdx;

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 << 10, kSharedBytes = 227 << 10;

// What a fiber waits for: that as many have arrived. Null: nothing.
struct Fiber {
    ucontext_t start;
    jmp_buf state;
    bool started, done;
    const int64_t* arrived;
    int64_t wanted;
    int64_t barriers, exchanges;  // that it has come to

    bool ready() const { return !done && (arrived == nullptr || *arrived >= wanted); }
};

// Values that the lanes of a warp exchange; two of each, as a lane may come to the next while others read.
struct Warp {
    uint64_t values[2][kWarp];
    int64_t arrived[2];
};

// The block that this thread of the tests runs. Its memory stays for the next one.
struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    int64_t arrived;
    bool any[3];
    jmp_buf scheduler;
    Fiber* current;
    std::function<void()> body;
    unsigned char *stacks = nullptr, *shared_pages = nullptr;
    void* shared;

    ~Block() {
        if (stacks) munmap(stacks, kStackBytes * 1024);
        if (shared_pages) munmap(shared_pages, kSharedBytes + 2 * sysconf(_SC_PAGESIZE));
    }
};
inline thread_local Block block;

inline void* pages(size_t bytes) {
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) testing::fail("no memory for %zu bytes", bytes);
    return mapped;
}

// Back to the scheduler; returns when the fiber's turn comes again.
__attribute__((noinline)) inline void pause() {
    if (_setjmp(block.current->state) == 0) _longjmp(block.scheduler, 1);
}

inline void wait_for(const int64_t* arrived, int64_t wanted) {
    Fiber* fiber = block.current;
    fiber->arrived = arrived, fiber->wanted = wanted;
    if (!fiber->ready()) pause();
    fiber->arrived = nullptr;
}

inline void enter() {
    block.body();
    block.current->done = true;
    _longjmp(block.scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber& fiber, unsigned thread) {
    block.current = &fiber;
    threadIdx.x = thread;
    if (_setjmp(block.scheduler) != 0) return;
    if (block.current->started) _longjmp(block.current->state, 1);
    block.current->started = true;
    setcontext(&block.current->start);
}

inline void start(int threads, size_t shared_bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    if (!block.stacks) block.stacks = static_cast<unsigned char*>(pages(kStackBytes * 1024));
    if (!block.shared_pages) {
        block.shared_pages = static_cast<unsigned char*>(pages(kSharedBytes + 2 * page));
        if (mprotect(block.shared_pages + (kSharedBytes + page) / page * page, page, PROT_NONE)) testing::fail("mprotect");
    }
    unsigned char* end = block.shared_pages + (kSharedBytes + page) / page * page;
    block.shared = end - (shared_bytes + 15) / 16 * 16;
    std::memset(block.shared, 0xFF, shared_bytes);
    block.arrived = 0;
    std::fill(block.any, block.any + 3, false);
    block.warps.assign(threads / kWarp, Warp{});
    block.fibers.resize(threads);
    for (int t = 0; t < threads; ++t) {
        Fiber& fiber = block.fibers[t];
        fiber.started = fiber.done = false;
        fiber.arrived = nullptr;
        fiber.barriers = fiber.exchanges = 0;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = block.stacks + t * kStackBytes;
        fiber.start.uc_stack.ss_size = kStackBytes;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
    }
}

// All turns of the block's threads, in an order that depends on `random`.
inline void run(testing::Random& random) {
    const int warps = static_cast<int>(block.warps.size());
    for (bool progress = true; progress;) {
        progress = false;
        const int first = static_cast<int>(random.integer(0, warps - 1)), way = random.chance(50) ? 1 : warps - 1;
        for (int n = 0; n < warps; ++n) {
            const int warp = static_cast<int>((first + static_cast<int64_t>(way) * n) % warps);
            const unsigned turn = static_cast<unsigned>(random.bits());
            for (bool more = true; more;) {
                more = false;
                for (unsigned i = 0; i < kWarp; ++i) {
                    const unsigned thread = warp * kWarp + (i ^ (turn % kWarp));
                    if (!block.fibers[thread].ready()) continue;
                    resume(block.fibers[thread], thread);
                    more = progress = true;
                }
            }
        }
    }
    for (const Fiber& fiber : block.fibers)
        if (!fiber.done) testing::fail("a thread of a block waits for others that never come");
}

inline uint64_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline uint64_t bits_of(int value) { return static_cast<uint32_t>(value); }
inline uint64_t bits_of(unsigned value) { return value; }

template <typename T>
T value_of(uint64_t bits) {
    const uint32_t low = static_cast<uint32_t>(bits);
    T value;
    static_assert(sizeof value == sizeof low, "");
    std::memcpy(&value, &low, sizeof value);
    return value;
}

// The values of all lanes of the warp.
template <typename T>
const uint64_t* exchange(unsigned mask, T value) {
    if (mask != 0xFFFFFFFFu) testing::fail("an exchange that lanes do not take part in");
    Fiber* fiber = block.current;
    Warp& warp = block.warps[threadIdx.x / kWarp];
    const int64_t round = fiber->exchanges++;
    warp.values[round % 2][threadIdx.x % kWarp] = bits_of(value);
    ++warp.arrived[round % 2];
    wait_for(&warp.arrived[round % 2], kWarp * (round / 2 + 1));
    return warp.values[round % 2];
}

}  // namespace on_cpu

using on_cpu::blockIdx;
using on_cpu::threadIdx;

inline int __syncthreads_or(int predicate) {
    using on_cpu::block;
    const int64_t round = block.current->barriers++;
    block.any[(round + 1) % 3] = false;  // of the barrier before the last, which all have left
    if (predicate) block.any[round % 3] = true;
    ++block.arrived;
    on_cpu::wait_for(&block.arrived, static_cast<int64_t>(block.fibers.size()) * (round + 1));
    return block.any[round % 3];
}
inline void __syncthreads() { __syncthreads_or(0); }
inline void __syncwarp() { on_cpu::exchange(0xFFFFFFFFu, 0); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
    return on_cpu::value_of<T>(on_cpu::exchange(mask, value)[lane]);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    const uint64_t* values = on_cpu::exchange(mask, value);
    return on_cpu::value_of<T>(values[(threadIdx.x % on_cpu::kWarp) ^ bits]);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int by) {
    const uint64_t* values = on_cpu::exchange(mask, value);
    const int lane = threadIdx.x % on_cpu::kWarp;
    return on_cpu::value_of<T>(values[lane >= by ? lane - by : lane]);
}
inline int __any_sync(unsigned mask, int predicate) {
    const uint64_t* values = on_cpu::exchange(mask, predicate);
    return std::any_of(values, values + on_cpu::kWarp, [](uint64_t value) { return value != 0; });
}
inline unsigned __match_any_sync(unsigned mask, unsigned value) {
    const uint64_t* values = on_cpu::exchange(mask, value);
    unsigned lanes = 0;
    for (int lane = 0; lane < on_cpu::kWarp; ++lane) lanes |= unsigned(values[lane] == value) << lane;
    return lanes;
}
inline int atomicAdd(int* to, int value) {
    const int before = *to;
    *to += value;
    return before;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __float_as_int(float value) { return on_cpu::value_of<int>(on_cpu::bits_of(value)); }
inline float __int_as_float(int bits) { return on_cpu::value_of<float>(on_cpu::bits_of(bits)); }

namespace icseg_cuda {

inline float4* shared_memory() { return static_cast<float4*>(on_cpu::block.shared); }

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, void*,
           const Arguments&... arguments) {
    if (threads % on_cpu::kWarp || threads > 1024 || shared_bytes > static_cast<int>(on_cpu::kSharedBytes)) {
        return ICSEG_CUDA_RUNTIME + 1;
    }
    testing::Random random(static_cast<uint64_t>(threads));
    for (int64_t b = 0; b < blocks; ++b) {
        blockIdx.x = static_cast<unsigned>(b);
        on_cpu::start(threads, shared_bytes);
        on_cpu::block.body = [&] { kernel(arguments...); };
        on_cpu::run(random);
    }
    return ICSEG_CUDA_OK;
}

}  // namespace icseg_cuda
