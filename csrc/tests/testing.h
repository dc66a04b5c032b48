// What the tests of the C ABI share: seeded randomness, memory that notices misuse, comparisons.
//
// A test makes a Case from a seed: inputs, and outputs by an obvious definition. The program then runs the case with
// every instruction set, several numbers of threads and from several threads at once; see main.cpp.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../icseg.h"

namespace testing {

// Print the message and how to repeat the case, and end the program.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

#define CHECK(condition) \
    do { \
        if (!(condition)) ::testing::fail("%s:%d: %s", __FILE__, __LINE__, #condition); \
    } while (false)

class Random {
public:
    explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}

    uint64_t bits();  // splitmix64
    bool chance(int percent) { return integer(0, 99) < percent; }
    int64_t integer(int64_t least, int64_t most) { return least + static_cast<int64_t>(bits() % (most - least + 1)); }
    double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }  // [0, 1)
    double normal();
    double value();  // mostly normal, now and then NaN, infinite, zero, huge or tiny
    // Mostly from -margin to length + margin, now and then as far off as an int64 goes.
    int64_t coordinate(int64_t length, int64_t margin);
    // Mostly from 1 to most, now and then 0.
    int64_t size(int64_t most) { return chance(6) ? 0 : integer(1, most); }

    template <typename T>
    T pick(std::initializer_list<T> choices) {
        return choices.begin()[integer(0, static_cast<int64_t>(choices.size()) - 1)];
    }

private:
    uint64_t state_;
};

// Memory that ends (or, by chance, begins) at a page that must not be touched. The rest of its pages is filled with a
// pattern that must be there at the end; AddressSanitizer also sees reads of it.
class Pages {
public:
    Pages(Random& random, size_t bytes, size_t alignment);
    ~Pages();
    Pages(Pages&& other) noexcept;
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;

    void* data() const { return data_; }  // null by chance if `bytes` is 0, as torch's

private:
    unsigned char *pages_, *begin_;
    void* data_;
    size_t length_, bytes_;
};

// An array in Pages.
template <typename T>
class Array {
public:
    Array(Random& random, int64_t count) : pages_(random, count * sizeof(T), alignof(T)), count_(count) {}

    T* data() const { return static_cast<T*>(pages_.data()); }
    int64_t count() const { return count_; }
    T& operator[](int64_t i) const {
        if (i < 0 || i >= count_) fail("the test itself reads element %lld of %lld", (long long)i, (long long)count_);
        return data()[i];
    }

private:
    Pages pages_;
    int64_t count_;
};

// An array for outputs: full of bytes that no op would write on all of them twice.
template <typename T>
Array<T> output(Random& random, int64_t count) {
    Array<T> array(random, count);
    if (count) std::memset(array.data(), random.pick({0x5A, 0xA5, 0xFF, 0x7F}), count * sizeof(T));
    return array;
}

// A tensor with strides: dimensions in any order, with gaps, expanded (stride 0) or backwards by chance.
template <typename T>
class Strided {
public:
    std::vector<int64_t> sizes, strides;

    Strided(Random& random, std::vector<int64_t> sizes_given, bool contiguous = false)
        : Strided(Layout(random, std::move(sizes_given), contiguous), random) {}

    T* data() const { return storage_.count() ? storage_.data() + origin_ : storage_.data(); }
    T& at(std::initializer_list<int64_t> index) const {
        int64_t place = origin_;
        for (size_t d = 0; d < sizes.size(); ++d) place += index.begin()[d] * strides[d];
        return storage_[place];
    }
    // Every element of the storage: each that `at` can reach, and the gaps.
    const Array<T>& storage() const { return storage_; }

    // Floats from random.value() if `hostile`, from random.normal() if not; NaN in the gaps.
    void fill(Random& random, bool hostile) {
        for (int64_t i = 0; i < storage_.count(); ++i) storage_[i] = static_cast<T>(NAN);
        each([&](T& element) { element = static_cast<T>(hostile ? random.value() : random.normal()); });
    }

    template <typename Visit>
    void each(const Visit& visit) const {
        std::vector<int64_t> index(sizes.size(), 0);
        int64_t count = 1;
        for (int64_t size : sizes) count *= size;
        for (int64_t n = 0; n < count; ++n) {
            int64_t rest = n, place = origin_;
            for (size_t d = sizes.size(); d-- > 0; rest /= sizes[d]) place += rest % sizes[d] * strides[d];
            visit(storage_[place]);
        }
    }

private:
    struct Layout {
        Layout(Random& random, std::vector<int64_t> sizes_given, bool contiguous) : sizes(std::move(sizes_given)) {
            const size_t rank = sizes.size();
            std::vector<size_t> order(rank);
            for (size_t d = 0; d < rank; ++d) order[d] = rank - 1 - d;
            const bool plain = contiguous || random.chance(30);
            for (size_t d = 0; !plain && random.chance(60) && d + 1 < rank; ++d)
                std::swap(order[d], order[random.integer(d, rank - 1)]);
            strides.resize(rank);
            int64_t extent = 1;
            for (const size_t d : order) {
                empty = empty || sizes[d] == 0;
                if (!plain && random.chance(10)) continue;  // expanded
                if (!plain && random.chance(20)) extent += random.integer(1, 3);
                strides[d] = extent;
                const int64_t last = (sizes[d] - 1) * extent;
                if (!plain && sizes[d] > 1 && random.chance(10)) {
                    strides[d] = -extent;
                    origin += last;
                }
                total += last;
                extent *= sizes[d];
            }
            const int64_t offset = plain || empty ? 0 : random.integer(0, 3);
            origin += offset;
            total = empty ? 0 : total + offset;
        }
        std::vector<int64_t> sizes, strides;
        int64_t origin = 0, total = 1;
        bool empty = false;
    };

    Strided(Layout layout, Random& random)
        : sizes(layout.sizes), strides(layout.strides), origin_(layout.origin), storage_(random, layout.total) {}

    int64_t origin_;
    Array<T> storage_;
};

// Integers or floats in one of the types that ops take coordinates in, mostly near 0 .. length.
class Coords {
public:
    // `most`: the last type to choose from. Of each pair, the first is along a height, the second along a width.
    Coords(Random& random, int64_t pairs, int64_t height, int64_t width, int64_t margin, icseg_coords most);

    int type() const { return type_; }
    const void* data() const;
    int64_t whole(int64_t i) const { return wholes_[i]; }  // of integer types
    double real(int64_t i) const { return reals_[i]; }     // of all types

private:
    int type_;
    std::vector<int64_t> wholes_;
    std::vector<double> reals_;
    Array<int32_t> int32_;
    Array<int64_t> int64_;
    Array<float> float_;
    Array<double> double_;
};

// The place of an element in a contiguous array of `sizes`.
inline int64_t place(std::initializer_list<int64_t> index, std::initializer_list<int64_t> sizes) {
    int64_t n = 0;
    for (size_t d = 0; d < sizes.size(); ++d) n = n * sizes.begin()[d] + index.begin()[d];
    return n;
}

// bfloat16 and back, rounded to nearest even.
inline float from_bfloat16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// An array with all that an op reads of a tensor, contiguous.
template <typename T>
Array<T> normals(Random& random, int64_t count, bool hostile = false) {
    Array<T> array(random, count);
    for (int64_t i = 0; i < count; ++i) array[i] = static_cast<T>(hostile ? random.value() : random.normal());
    return array;
}

// Bits of all outputs of a run.
class Digest {
public:
    template <typename T>
    void add(const Array<T>& output) {
        const unsigned char* bytes = reinterpret_cast<const unsigned char*>(output.data());
        for (size_t i = 0; i < output.count() * sizeof(T); ++i) value_ = (value_ ^ bytes[i]) * 0x100000001B3u;
    }
    uint64_t value() const { return value_; }

private:
    uint64_t value_ = 0xCBF29CE484222325u;
};

// The same bits.
template <typename T>
void expect_equal(const char* what, const Array<T>& found, const std::vector<T>& expected) {
    CHECK(found.count() == static_cast<int64_t>(expected.size()));
    for (int64_t i = 0; i < found.count(); ++i)
        if (std::memcmp(&found[i], &expected[i], sizeof(T)))
            fail("%s[%lld] is %.9g, expected %.9g", what, (long long)i, (double)found[i], (double)expected[i]);
}

// |found - expected| <= absolute[i] (or the one bound), NaN where NaN is expected, the same infinity.
template <typename T>
void expect_close(const char* what, const Array<T>& found, const std::vector<double>& expected,
                  const std::vector<double>& absolute) {
    CHECK(found.count() == static_cast<int64_t>(expected.size()));
    for (int64_t i = 0; i < found.count(); ++i) {
        const double bound = absolute.at(absolute.size() == 1 ? 0 : i), value = found[i], wanted = expected[i];
        const bool near = std::isnan(wanted)                       ? std::isnan(value)
                          : std::isinf(static_cast<T>(wanted))     ? value == static_cast<T>(wanted)
                                                                   : std::fabs(value - wanted) <= bound;
        if (!near)
            fail("%s[%lld] is %.9g, expected %.9g within %.3g", what, (long long)i, value, wanted, bound);
    }
}

// A call that must be refused with `code`.
#define EXPECT_CODE(code, ...) \
    do { \
        const int given_ = (__VA_ARGS__); \
        if (given_ != (code)) \
            ::testing::fail("%s:%d: code %d (%s), expected %d", __FILE__, __LINE__, given_, icseg_error(given_), code); \
    } while (false)

// Whether another thread changes the instruction set all the while, so that calls may differ by rounding.
bool switching();

// Inputs of one call and what must come of it.
class Case {
public:
    virtual ~Case() = default;
    // Call the op into fresh outputs and compare; Digest of them. Many threads may run a case at once.
    virtual uint64_t run(uint64_t seed) const = 0;
};

struct Test {
    // large: enough work for several threads.
    using Make = std::unique_ptr<Case> (*)(Random& random, bool large);

    Test(const char* name_given, Make make_given, void (*errors_given)());
    static std::vector<const Test*>& all();

    const char* name;
    Make make;
    void (*errors)();
};

}  // namespace testing
