// Drawing without replacement, a row at a time: the k largest of logits + noise. Internal linkage, as all that a
// kernel file includes (see isa.h).
//
// A kernel that has a row of logits draws from it so:
//
//     const Summary<Real> sum = summarise(logits, n);                        // its maximum and logsumexp
//     draw_row(logits, n, k, noise, likely_floor(sum, k), workspace, {indices, scores, &kappa, &kappa_index});
//
// logits     n contiguous elements, n < 2^31, 0 <= k <= n. -inf and NaN are never drawn.
// noise      Noise<Real>::of_seed({seed, row, 0, 0}), ::of_values(pointer to n contiguous elements) or ::none().
// floor      a guess that saves work: a score that a few more than k + 1 elements exceed. Any value gives the same
//            result. likely_floor(sum, k) with noise of a seed; -infinity if nothing is known.
// workspace  draw_workspace(n, k) elements of Key<Real> (draw_sizes.h); no more than kStackKeys, which a kernel can
//            keep on its stack, for k <= kStackDraws. Beyond, the caller of the library provides draw_row_bytes for
//            each row that shall be drawn at the same time.
// results    indices [k] and scores [k], descending, equal scores by ascending index; -1 and -infinity where nothing
//            was left; kappa and its index are the (k + 1)-th (null pointers: not wanted).
//
// How: one pass keeps what exceeds `floor`, the (k + 1)-th best score so far, in a buffer of 2 (k + 1) + kSpare keys;
// a full buffer is cut back to its k + 1 best, which raises the floor. A later element that equals the floor loses
// by its index. Of seeded noise, only the random words are made for every element, and logarithms for those that a
// cheap test of their word does not rule out.
#pragma once

#include "draw_sizes.h"
#include "exponential.h"
#include "philox.h"

namespace {

template <typename Real>
struct Noise {
    const Real* values;
    bool seeded;
    Stream stream;

    static Noise none() { return {nullptr, false, {}}; }
    static Noise of_values(const Real* values) { return {values, false, {}}; }
    static Noise of_seed(const Stream& stream) { return {nullptr, true, stream}; }
};

template <typename Real>
struct Drawn {
    int64_t* indices;
    Real* scores;
    Real* kappa;
    int64_t* kappa_index;
};

template <typename Real>
struct Summary {
    Real most, logsumexp;
};

constexpr float kInfinity = __builtin_inff();

// ---- Keys: a score and its index in one number, larger for what comes first.

template <typename Real>
struct KeyOf;
template <>
struct KeyOf<float> {
    typedef uint64_t Key;
    typedef uint32_t Bits;
};
template <>
struct KeyOf<double> {
    typedef unsigned __int128 Key;
    typedef uint64_t Bits;
};

template <typename Real>
using Key = typename KeyOf<Real>::Key;

template <typename Real>
inline Key<Real> key_of(Real score, uint32_t index) {
    using Bits = typename KeyOf<Real>::Bits;
    constexpr Bits kSign = Bits(1) << (8 * sizeof(Bits) - 1);
    Bits bits;
    score += 0;  // equal zeros get equal keys
    std::memcpy(&bits, &score, sizeof(bits));
    bits ^= bits & kSign ? ~Bits(0) : kSign;
    return static_cast<Key<Real>>(bits) << 32 | static_cast<uint32_t>(~index);
}

template <typename Real>
inline Real score_of(Key<Real> key) {
    using Bits = typename KeyOf<Real>::Bits;
    constexpr Bits kSign = Bits(1) << (8 * sizeof(Bits) - 1);
    Bits bits = static_cast<Bits>(key >> 32);
    bits ^= bits & kSign ? kSign : ~Bits(0);
    Real score;
    std::memcpy(&score, &bits, sizeof(bits));
    return score;
}

template <typename Key>
inline uint32_t index_of(Key key) { return ~static_cast<uint32_t>(key); }

// ---- Selection and sorting of keys, which differ from each other.

// Descending.
template <typename Key>
inline void insertion_sort(Key* keys, int64_t count) {
    for (int64_t i = 1; i < count; ++i) {
        const Key key = keys[i];
        int64_t j = i;
        for (; j > 0 && keys[j - 1] < key; --j) keys[j] = keys[j - 1];
        keys[j] = key;
    }
}

template <typename Key>
inline Key median(Key a, Key b, Key c) {
    return larger(smaller(a, b), smaller(larger(a, b), c));
}

// Moves the `most` largest of keys[0, count) to the front, most <= count; spare holds as many.
template <typename Key>
inline void select_largest(Key* keys, int64_t count, int64_t most, Key* spare) {
    uint64_t random = 0x9E3779B97F4A7C15;
    int64_t first = 0, last = count;  // before: among the largest; behind: not
    while (first < most && most < last) {
        const int64_t size = last - first;
        if (size <= 24) {
            insertion_sort(keys + first, size);
            return;
        }
        Key sample[3];
        for (Key& key : sample) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            key = keys[first + static_cast<int64_t>((random >> 33) % static_cast<uint64_t>(size))];
        }
        const Key pivot = median(sample[0], sample[1], sample[2]);
        Key* above = keys + first;
        Key* below = spare;
        for (int64_t i = first; i < last; ++i) {
            const Key key = keys[i];
            const bool is_above = key > pivot;
            *above = key;
            above += is_above;
            *below = key;
            below += !is_above;
        }
        const int64_t split = above - keys;  // the pivot is below
        if (split >= most) {
            last = split;
            continue;
        }
        std::memcpy(above, spare, (below - spare) * sizeof(Key));
        first = split;
        if (split == last - size) {  // the pivot is the largest: take it alone
            for (int64_t i = first; i < last; ++i) {
                if (keys[i] != pivot) continue;
                keys[i] = keys[first];
                keys[first++] = pivot;
                break;
            }
        }
    }
}

constexpr int64_t kRun = 16;

// The same for kRun keys: a key's place is the number of larger ones.
template <typename Key>
inline void sort_run(Key* keys) {
    Key places[kRun] = {}, sorted[kRun];
    for (int64_t j = 0; j < kRun; ++j) {
        const Key other = keys[j];
        for (int64_t i = 0; i < kRun; ++i) places[i] += other > keys[i];
    }
    for (int64_t i = 0; i < kRun; ++i) sorted[places[i]] = keys[i];
    std::memcpy(keys, sorted, sizeof(sorted));
}

// Descending, by merging runs; spare holds as many.
template <typename Key>
inline void sort_descending(Key* keys, int64_t count, Key* spare) {
    int64_t sorted_until = 0;
    for (; sorted_until + kRun <= count; sorted_until += kRun) sort_run(keys + sorted_until);
    insertion_sort(keys + sorted_until, count - sorted_until);
    Key* from = keys;
    Key* to = spare;
    for (int64_t run = kRun; run < count; run *= 2) {
        for (int64_t start = 0; start < count; start += 2 * run) {
            const Key* a = from + start;
            const Key* b = from + smaller(start + run, count);
            const Key* const a_end = b;
            const Key* const b_end = from + smaller(start + 2 * run, count);
            Key* out = to + start;
            while (a < a_end && b < b_end) {
                const Key x = *a, y = *b;
                const int64_t take_a = x > y;  // no jump, which would be mispredicted every other time
                *out++ = y ^ ((x ^ y) & (Key(0) - static_cast<Key>(take_a)));
                a += take_a;
                b += 1 - take_a;
            }
            std::memcpy(out, a, (a_end - a) * sizeof(Key));
            std::memcpy(out + (a_end - a), b, (b_end - b) * sizeof(Key));
        }
        Key* const sorted = to;
        to = from;
        from = sorted;
    }
    if (from != keys) std::memcpy(keys, from, count * sizeof(Key));
}

// ---- The buffer of the best keys so far.

template <typename Real>
struct Best {
    Key<Real>* keys;
    int64_t capacity, most, count;
    Real floor;

    // For k + 1 of n elements, of which those beyond `floor` are looked at.
    Best(int64_t n, int64_t k, Real floor, Key<Real>* workspace)
        : keys(workspace), capacity(buffer_keys(n, k)), most(k + 1), count(0), floor(floor) {}

    void push(Real score, int64_t index) {
        keys[count] = key_of(score, static_cast<uint32_t>(index));
        count += score > floor;
        if (count == capacity) cut();
    }

    // One that exceeds the floor.
    void push_key(Key<Real> key) {
        keys[count++] = key;
        if (count == capacity) cut();
    }

    // Cut back to the k + 1 best, in no order.
    void cut() {
        if (count <= most) return;
        select_largest(keys, count, most, keys + capacity);
        count = most;
        Key<Real> least = keys[0];
        for (int64_t i = 1; i < count; ++i) least = smaller(least, keys[i]);
        floor = larger(floor, score_of<Real>(least));
    }
};

// ---- One pass over a row.

constexpr int64_t kBlock = 256;
static_assert(kBlock % kPassElements == 0 && kPassElements % kGumbels == 0, "a block is a whole number of passes");

// One bit a lane: a > b, false for NaN.
inline uint32_t above(Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
#elif defined(__SSE2__)
    return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpgt_ps(a, b)));
#else
    uint32_t bits = 0;
    for (int64_t i = 0; i < kLanes<float>; ++i) bits |= static_cast<uint32_t>(a[i] > b[i]) << i;
    return bits;
#endif
}

// Appends first + the number of every bit that is set; returns how many. Writes up to a vector of garbage beyond.
inline int64_t append(uint32_t* to, uint32_t first, uint32_t bits) {
#if defined(__AVX512F__)
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i values = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(first)));
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), values));
    return __builtin_popcount(bits);
#else
    int64_t count = 0;
    for (; bits; bits &= bits - 1) to[count++] = first + static_cast<uint32_t>(__builtin_ctz(bits));
    return count;
#endif
}

inline Vector<float> excess(const float* logits, float floor) { return load(logits) - floor; }
inline Vector<float> excess(const double* logits, double floor) {
    Vector<float> result;
    for (int64_t i = 0; i < kLanes<float>; ++i) result[i] = static_cast<float>(logits[i] - floor);
    return result;
}

// Which elements of a block may exceed the floor, by their random words: `found` gets their places, in order.
//
// An element does so only if its noise g = -log E exceeds floor - l, in real numbers: the rounding of l + g is
// monotonic, and the floor is a number of the same type. E >= v, so log2 v < (l - floor) log2(e) =: x must hold, but
// for the error of g, at most 1e-5. Let u = (r >> 8) * 2^-24 <= v. Read as an integer, a positive float's bits are at
// most 2^23 (log2 + 127), as 1 + f >= 2^f for 0 <= f <= 1. So bits(u) <= 2^23 (x + 127) must hold, but for errors,
// which 1024 covers: 2^23 * 1e-5 * log2(e) = 121 of g; where the comparison is close, which needs |x| < 256,
// 64 for the conversion of bits to float, and 4 roundings of at most 2^31 * 2^-24 = 128 on the other side.
// u = 0 has bits 0, and x < -127 rules every element out: g < 23. The scale 2^24 of u is taken into the constant.
template <typename Real>
inline int64_t find_seeded(const Real* logits, const uint32_t* words, Real floor, uint32_t* found) {
    constexpr float kScale = 1.44269504f * 8388608;
    constexpr float kBias = (127 + 24) * 8388608.0f + 1024;
    int64_t count = 0;
    for (int64_t i = 0; i < kBlock; i += kLanes<float>) {
        const Vector<int32_t> word = (Vector<int32_t>)(load(words + i) >> 8);
        const Vector<int32_t> bits = (Vector<int32_t>)__builtin_convertvector(word, Vector<float>);
        const Vector<float> bound = fma(excess(logits + i, floor), broadcast(kScale), broadcast(kBias));
        const uint32_t may = above(bound, __builtin_convertvector(bits, Vector<float>));
        if (may) count += append(found + count, static_cast<uint32_t>(i), may);
    }
    return count;
}

inline uint32_t above(const float* values, const float* noise, float floor) {
    const Vector<float> sum = noise == nullptr ? load(values) : load(values) + load(noise);
    return above(sum, broadcast(floor));
}
inline uint32_t above(const double* values, const double* noise, double floor) {
    uint32_t bits = 0;
    for (int64_t i = 0; i < kLanes<float>; ++i) {
        const double sum = noise == nullptr ? values[i] : values[i] + noise[i];
        bits |= static_cast<uint32_t>(sum > floor) << i;
    }
    return bits;
}

// Elements that may exceed the floor by their words, until there are enough for their logarithms to be worth it.
template <typename Real>
struct Stage {
    int64_t count = 0;
    uint32_t words[kBlock + kGumbels] = {};
    uint32_t indices[kBlock + kGumbels];
    Real logits[kBlock + kGumbels];

    // Takes from a block that begins at element `first` of the row those `found`.
    void add(const Real* block, const uint32_t* block_words, int64_t first, const uint32_t* found, int64_t some) {
        for (int64_t j = 0; j < some; ++j) {
            const uint32_t i = found[j];
            words[count + j] = block_words[i];
            indices[count + j] = static_cast<uint32_t>(first) + i;
            logits[count + j] = block[i];
        }
        count += some;
    }

    // Hands on all but those that do not fill kGumbels, or `all`.
    void flush(Best<Real>& best, bool all) {
        float noise[kGumbels];
        int64_t start = 0;
        for (; start + kGumbels <= count || (all && start < count); start += kGumbels) {
            gumbel(words + start, noise);
            const int64_t some = smaller(count - start, kGumbels);
            for (int64_t j = 0; j < some; ++j) {
                best.push(logits[start + j] + static_cast<Real>(noise[j]), indices[start + j]);
            }
        }
        count = larger(count - start, int64_t(0));
        std::memmove(words, words + start, count * sizeof(words[0]));
        std::memmove(indices, indices + start, count * sizeof(indices[0]));
        std::memmove(logits, logits + start, count * sizeof(logits[0]));
    }
};

// Looks at a block that begins at element `first` of the row.
template <typename Real>
inline void take_block(const Real* logits, const Real* values, const Noise<Real>& noise, int64_t first,
                       Stage<Real>& stage, Best<Real>& best) {
    uint32_t found[kBlock + kLanes<uint32_t>];
    if (noise.seeded) {
        uint32_t words[kBlock];
        philox(noise.stream, first, kBlock, words);
        stage.add(logits, words, first, found, find_seeded(logits, words, best.floor, found));
        if (stage.count >= kGumbels) stage.flush(best, false);
        return;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < kBlock; i += kLanes<float>) {
        const uint32_t bits = above(logits + i, values == nullptr ? nullptr : values + i, best.floor);
        if (bits) count += append(found + count, static_cast<uint32_t>(i), bits);
    }
    for (int64_t j = 0; j < count; ++j) {
        const uint32_t i = found[j];
        best.push(values == nullptr ? logits[i] : logits[i] + values[i], first + i);
    }
}

// Looks at elements [first, last) of a row, in order; first is a multiple of kBlock.
template <typename Real>
inline void take(const Real* logits, int64_t first, int64_t last, const Noise<Real>& noise, Best<Real>& best) {
    Stage<Real> stage;
    int64_t i = first;
    for (; i + kBlock <= last; i += kBlock) {
        take_block(logits + i, noise.values == nullptr ? nullptr : noise.values + i, noise, i, stage, best);
    }
    if (i < last) {
        Real tail[kBlock], tail_noise[kBlock] = {};
        for (Real& x : tail) x = -kInfinity;
        std::memcpy(tail, logits + i, (last - i) * sizeof(Real));
        if (noise.values != nullptr) std::memcpy(tail_noise, noise.values + i, (last - i) * sizeof(Real));
        take_block(tail, noise.values == nullptr ? nullptr : tail_noise, noise, i, stage, best);
    }
    stage.flush(best, true);
}

// A score of zero, whose sign its key has lost.
template <typename Real>
inline Real signed_zero(const Real* logits, const Noise<Real>& noise, int64_t index) {
    if (!noise.seeded) return noise.values == nullptr ? logits[index] : logits[index] + noise.values[index];
    uint32_t words[kPassElements];
    float gumbels[kGumbels];
    const int64_t first = index & ~int64_t(3);
    philox(noise.stream, first, kPassElements, words);
    gumbel(words, gumbels);
    return logits[index] + static_cast<Real>(gumbels[index - first]);
}

// Writes the k best out, in order, and kappa.
template <typename Real>
inline void finish(const Real* logits, int64_t k, const Noise<Real>& noise, Best<Real>& best,
                   const Drawn<Real>& out) {
    best.cut();
    sort_descending(best.keys, best.count, best.keys + best.capacity);
    for (int64_t j = 0; j <= k; ++j) {
        int64_t index = -1;
        Real score = -kInfinity;
        if (j < best.count) {
            index = index_of(best.keys[j]);
            score = score_of<Real>(best.keys[j]);
            if (score == 0) score = signed_zero(logits, noise, index);
        }
        if (j < k) {
            out.indices[j] = index;
            out.scores[j] = score;
        } else {
            if (out.kappa != nullptr) *out.kappa = score;
            if (out.kappa_index != nullptr) *out.kappa_index = index;
        }
    }
}

template <typename Real>
inline void draw_row(const Real* logits, int64_t n, int64_t k, const Noise<Real>& noise, Real floor,
                     Key<Real>* workspace, const Drawn<Real>& out) {
    Best<Real> best(n, k, floor, workspace);
    take(logits, 0, n, noise, best);
    if (best.count <= k && floor > -kInfinity) {  // the guess was too high
        best = Best<Real>(n, k, -kInfinity, workspace);
        take(logits, 0, n, noise, best);
    }
    finish(logits, k, noise, best, out);
}

// ---- Sums.

// exp(x) for x < 1; NaN counts as -inf.
template <typename Real>
inline Vector<Real> exp_below(Vector<Real> x) {
    return x == x ? exponential<Real>(x) : Vector<Real>{};
}

constexpr int64_t kSumBlock = 2048;

// The maximum and the sum of exp(logit - maximum) of part of a row.
template <typename Real>
struct Sum {
    Real most;
    double total;

    void add(Sum other) {
        if (other.most > most) {
            const Sum mine = *this;
            *this = other;
            other = mine;
        }
        if (other.total > 0) total += other.total * std::exp(static_cast<double>(other.most) - most);
    }
};

// Of at most kSumBlock elements. A maximum of -inf or inf comes with a total of 0.
template <typename Real>
inline Sum<Real> sum_block(const Real* logits, int64_t count) {
    Vector<Real> mosts = broadcast<Real>(-kInfinity), totals = {};
    Vector<Real> tail = broadcast<Real>(-kInfinity);
    const int64_t whole = count / kLanes<Real> * kLanes<Real>;
    std::memcpy(&tail, logits + whole, (count - whole) * sizeof(Real));
    for (int64_t i = 0; i < whole; i += kLanes<Real>) {
        const Vector<Real> x = load(logits + i);
        mosts = x > mosts ? x : mosts;
    }
    mosts = tail > mosts ? tail : mosts;
    Real most = -kInfinity;
    for (int64_t i = 0; i < kLanes<Real>; ++i) most = larger(most, mosts[i]);
    if (!(most - most == 0)) return {most, 0};
    for (int64_t i = 0; i < whole; i += kLanes<Real>) totals += exp_below<Real>(load(logits + i) - most);
    totals += exp_below<Real>(tail - most);
    double total = 0;
    for (int64_t i = 0; i < kLanes<Real>; ++i) total += totals[i];
    return {most, total};
}

template <typename Real>
inline Sum<Real> sum_range(const Real* logits, int64_t first, int64_t last) {
    Sum<Real> sum{-kInfinity, 0};
    for (int64_t i = first; i < last; i += kSumBlock) sum.add(sum_block(logits + i, smaller(kSumBlock, last - i)));
    return sum;
}

template <typename Real>
inline Summary<Real> summary_of(const Sum<Real>& sum) {
    if (sum.total == 0) return {sum.most, sum.most};
    return {sum.most, static_cast<Real>(sum.most + std::log(sum.total))};
}

// The maximum and log(sum(exp(logits))), NaN counting as -inf; -inf of no elements, inf if one is.
template <typename Real>
inline Summary<Real> summarise(const Real* logits, int64_t n) { return summary_of(sum_range(logits, int64_t(0), n)); }

// A score that about m + 6 sqrt(m) + 10 seeded scores exceed, m = k + 1, if no weight dominates: the number of
// exponentials E_i < w_i T is a sum of independent trials of mean just below T times the sum of the weights w_i.
template <typename Real>
inline Real likely_floor(const Summary<Real>& sum, int64_t k) {
    const double m = static_cast<double>(k + 1), wanted = m + 6 * std::sqrt(m) + 10;
    const Real floor = static_cast<Real>(sum.logsumexp - std::log(wanted));
    return floor >= sum.most ? floor : -kInfinity;  // false also for NaN
}

}  // namespace
