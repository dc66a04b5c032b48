// Tests of the C ABI (icseg.h) without Python: random cases against obvious definitions.
//
//     tests [--seed S] [--iterations N] [test ...]
//
// Iteration i of seed S is iteration 0 of seed S + i: what a failure prints repeats that case alone.
#include "testing.h"

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include <csignal>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace testing {
namespace {

constexpr unsigned char kPattern = 0xC7;
constexpr int kThreads = 3;  // OpenMP's, and those that call at once
constexpr unsigned kForkSeconds = 60;

// What is running, for fail().
std::atomic<const char*> current{"no test"};
std::atomic<uint64_t> current_seed{0};
std::atomic<bool> current_is_large{false};
std::atomic<bool> current_is_switching{false};

void set_threads(int count) {
#ifdef _OPENMP
    omp_set_num_threads(count);
#else
    (void)count;
#endif
}

void say_how_to_repeat() {
    std::fprintf(stderr, "in %s with %s; repeat it with: --seed %llu --iterations 1 %s%s\n", current.load(), icseg_isa(),
                 static_cast<unsigned long long>(current_seed.load()), current_is_large ? "--large " : "",
                 current.load());
}

// Once more by default, so that the process ends as it would have.
[[maybe_unused]] void crashed(int number) {
    say_how_to_repeat();
    std::signal(number, SIG_DFL);
    std::raise(number);
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const char* name : {"portable", "avx2", "avx512"})
        if (icseg_select_isa(name) == ICSEG_OK) names.push_back(name);
    icseg_select_isa(nullptr);
    return names;
}

// The same bits from any number of threads and any place in memory.
void every_way(const Case& test, uint64_t seed) {
    for (const std::string& isa : instruction_sets()) {
        icseg_select_isa(isa.c_str());
        set_threads(1);
        const uint64_t digest = test.run(seed);
        set_threads(kThreads);
        CHECK(test.run(seed + 1) == digest);
        set_threads(1);
    }
    icseg_select_isa(nullptr);
}

// Several threads on the same inputs, while another changes the instruction set.
void at_once(const Case& test, uint64_t seed) {
    std::vector<std::thread> threads;
    std::atomic<int> running{kThreads};
    const uint64_t alone = test.run(seed);
    for (const bool switching : {false, true}) {
        current_is_switching = switching;
        running = kThreads;
        for (int n = 0; n < kThreads; ++n)
            threads.emplace_back([&, n] {
                set_threads(1 + n % 2);
                for (int i = 0; i < 2; ++i) {
                    const uint64_t digest = test.run(seed + n + i);
                    CHECK(switching || digest == alone);
                }
                --running;
            });
        if (switching)
            while (running)
                for (const std::string& isa : instruction_sets()) icseg_select_isa(isa.c_str());
        for (std::thread& thread : threads) thread.join();
        threads.clear();
    }
    current_is_switching = false;
    icseg_select_isa(nullptr);
}

// A child of a process whose OpenMP threads exist, which fork does not copy.
void after_fork(const Case& test, uint64_t seed) {
    set_threads(kThreads);
    const uint64_t digest = test.run(seed);
    std::fflush(nullptr);
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(kForkSeconds);
        _exit(test.run(seed) == digest ? 0 : 1);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    if (!WIFEXITED(status) || WEXITSTATUS(status)) fail("a child process ended with status %d", status);
    CHECK(test.run(seed) == digest);
    set_threads(1);
}

void run(const Test& test, uint64_t seed, int64_t iterations, bool only_large) {
    current = test.name;
    std::printf("%s\n", test.name);
    std::fflush(stdout);
    test.errors();
    for (int64_t i = 0; i < iterations; ++i) {
        current_seed = seed + i;
        const bool large = only_large || i % 16 == 8;
        current_is_large = large;
        Random random(seed + i);
        const std::unique_ptr<Case> made = test.make(random, large);
        every_way(*made, seed + i);
        if (i % 8 == 0) at_once(*made, seed + i);
        if (i == 8) after_fork(*made, seed + i);
    }
}

}  // namespace

bool switching() { return current_is_switching; }

void fail(const char* format, ...) {
    std::va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fputc('\n', stderr);
    say_how_to_repeat();
    std::_Exit(1);
}

uint64_t Random::bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

double Random::normal() {
    return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform());
}

double Random::value() {
    if (!chance(10)) return normal();
    return pick<double>({NAN, INFINITY, -INFINITY, 0, -0.0, 1e30, -1e30, 1e-42, 1});
}

int64_t Random::coordinate(int64_t length, int64_t margin) {
    if (!chance(15)) return integer(-margin, length + margin);
    return pick<int64_t>({INT64_MIN, INT64_MIN + 1, INT32_MIN, -length - 1, -1, 0, length, INT32_MAX, INT64_MAX - 1,
                          INT64_MAX});
}

Coords::Coords(Random& random, int64_t pairs, int64_t height, int64_t width, int64_t margin, icseg_coords most)
    : type_(static_cast<int>(random.integer(0, most))),
      wholes_(2 * pairs),
      reals_(2 * pairs),
      int32_(random, type_ == ICSEG_COORDS_INT32 ? 2 * pairs : 0),
      int64_(random, type_ == ICSEG_COORDS_INT64 ? 2 * pairs : 0),
      float_(random, type_ == ICSEG_COORDS_FLOAT32 ? 2 * pairs : 0),
      double_(random, type_ == ICSEG_COORDS_FLOAT64 ? 2 * pairs : 0) {
    for (int64_t i = 0; i < 2 * pairs; ++i) {
        const int64_t whole = random.coordinate(i % 2 ? width : height, margin);
        const double real = random.chance(5) ? random.pick<double>({NAN, INFINITY, -INFINITY, 1e300, -1e300})
                            : random.chance(50) ? static_cast<double>(whole) : whole + random.uniform();
        switch (type_) {
            case ICSEG_COORDS_INT32: wholes_[i] = int32_[i] = static_cast<int32_t>(whole); break;
            case ICSEG_COORDS_INT64: wholes_[i] = int64_[i] = whole; break;
            case ICSEG_COORDS_FLOAT32: reals_[i] = float_[i] = std::fabs(real) > 1e30 ? INFINITY : float(real); break;
            default: reals_[i] = double_[i] = real;
        }
        if (type_ <= ICSEG_COORDS_INT64) reals_[i] = static_cast<double>(wholes_[i]);
    }
}

const void* Coords::data() const {
    switch (type_) {
        case ICSEG_COORDS_INT32: return int32_.data();
        case ICSEG_COORDS_INT64: return int64_.data();
        case ICSEG_COORDS_FLOAT32: return float_.data();
        default: return double_.data();
    }
}

Pages::Pages(Random& random, size_t bytes, size_t alignment) : bytes_(bytes) {
    const size_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page + page;
    length_ = inside + 2 * page;
    void* mapped = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) fail("no memory for %zu bytes", bytes);
    pages_ = static_cast<unsigned char*>(mapped);
    std::memset(pages_ + page, kPattern, inside);
    if (mprotect(pages_, page, PROT_NONE) || mprotect(pages_ + length_ - page, page, PROT_NONE)) fail("mprotect");
    begin_ = pages_ + page;
    if (!random.chance(30)) begin_ += (inside - bytes) / alignment * alignment;
    data_ = bytes || random.chance(50) ? begin_ : nullptr;
    ASAN_POISON_MEMORY_REGION(pages_ + page, begin_ - pages_ - page);
    ASAN_POISON_MEMORY_REGION(begin_ + bytes, pages_ + length_ - page - begin_ - bytes);
}

Pages::Pages(Pages&& other) noexcept
    : pages_(other.pages_), begin_(other.begin_), data_(other.data_), length_(other.length_), bytes_(other.bytes_) {
    other.pages_ = nullptr;
}

Pages::~Pages() {
    if (!pages_) return;
    const size_t page = sysconf(_SC_PAGESIZE);
    ASAN_UNPOISON_MEMORY_REGION(pages_ + page, length_ - 2 * page);
    for (unsigned char* byte = pages_ + page; byte < pages_ + length_ - page; ++byte)
        if (*byte != kPattern && (byte < begin_ || byte >= begin_ + bytes_))
            fail("written %td bytes from the start of an array of %zu bytes", byte - begin_, bytes_);
    munmap(pages_, length_);
}

Test::Test(const char* name_given, Make make_given, void (*errors_given)())
    : name(name_given), make(make_given), errors(errors_given) {
    all().push_back(this);
}

std::vector<const Test*>& Test::all() {
    static std::vector<const Test*> tests;
    return tests;
}

}  // namespace testing

int main(int count, char** arguments) {
    using namespace testing;
    uint64_t seed = 0;
    int64_t iterations = 64;
    bool large = false;
    std::vector<std::string> names;
    for (int i = 1; i < count; ++i) {
        const std::string argument = arguments[i];
        if (argument == "--large") {
            large = true;
        } else if (argument.rfind("--", 0) != 0) {
            names.push_back(argument);
        } else if (argument == "--seed" && i + 1 < count) {
            seed = std::strtoull(arguments[++i], nullptr, 10);
        } else if (argument == "--iterations" && i + 1 < count) {
            iterations = std::strtoll(arguments[++i], nullptr, 10);
        } else {
            std::fprintf(stderr, "unknown option %s; usage: [--seed S] [--iterations N] [--large] [test ...]\n",
                         argument.c_str());
            return 2;
        }
    }
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    __sanitizer_set_death_callback(say_how_to_repeat);
#else
    for (const int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) std::signal(number, crashed);
#endif
    size_t found = 0;
    for (const Test* test : Test::all()) {
        bool wanted = names.empty();
        for (const std::string& name : names) wanted = wanted || name == test->name;
        if (!wanted) continue;
        run(*test, seed, iterations, large);
        ++found;
    }
    if (found < std::max<size_t>(names.size(), 1)) {
        std::fprintf(stderr, "no such test; there are:");
        for (const Test* test : Test::all()) std::fprintf(stderr, " %s", test->name);
        std::fputc('\n', stderr);
        return 2;
    }
    std::string sets;
    for (const std::string& name : instruction_sets()) sets += " " + name;
    std::printf("%zu tests passed, %lld iterations from seed %llu,%s, %s\n", found, static_cast<long long>(iterations),
                static_cast<unsigned long long>(seed), sets.c_str(), icseg_build());
    return 0;
}
