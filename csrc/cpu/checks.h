// Checks of sizes that the entries share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "../icseg.h"

namespace icseg {

inline bool any_negative(std::initializer_list<int64_t> sizes) {
    return std::any_of(sizes.begin(), sizes.end(), [](int64_t size) { return size < 0; });
}

// The product in *product; false if it, or one of its factors' products, needs more than 63 bits.
inline bool multiply(std::initializer_list<int64_t> factors, int64_t* product) {
    *product = 1;
    return std::none_of(factors.begin(), factors.end(),
                        [&](int64_t factor) { return __builtin_mul_overflow(*product, factor, product); });
}

}  // namespace icseg
