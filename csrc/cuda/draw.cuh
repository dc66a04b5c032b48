// Drawing without replacement, a row by one block: the `most` largest of logits + noise, in order.
//
// The row is taken in chunks of kThreads * 4 * kGroups elements, so many to a thread's registers. What may be drawn is
// appended to keys in shared memory; where they do not fit, a radix select over them and the chunk's keeps the best
// `most`, which raises the bound that later elements must reach. With seeded noise the bound is guessed at first, so
// that a few more than `most` reach it and nothing is selected: of most elements only the random words are made, and
// logarithms for those that a cheap test of their word does not rule out. At last the keys are sorted.
//
// A key is a score and its index in one number, larger for what comes first.
#pragma once

#include "block.cuh"
#include "philox.cuh"

namespace icseg_cuda {

constexpr int kMostKeys = ICSEG_CUDA_MOST_DRAWS;
constexpr int kDigits = 256;
constexpr uint32_t kMinusInfinityBits = 0x007FFFFFu;  // as ordered() has it

struct DrawScratch {
    float partial[kWarp];
    int histogram[kDigits];
    int count;                     // keys appended, or that there was room for
    int digit, remaining, bucket;  // what a digit of the select found
};

__host__ __device__ inline int smaller(int a, int b) { return b < a ? b : a; }

// The keys that a draw of the `most` largest keeps.
inline int draw_capacity(int64_t most) {
    int capacity = 256;
    while (capacity < kMostKeys && capacity < 2 * most) capacity *= 2;
    return capacity;
}

__device__ __forceinline__ float minus_infinity() { return __int_as_float(static_cast<int>(0xFF800000u)); }

// A score's bits, as unsigned in the order of scores.
__device__ __forceinline__ uint32_t ordered(float score) {
    const uint32_t bits = static_cast<uint32_t>(__float_as_int(score == 0 ? 0.0f : score));  // zeros are equal
    return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

__device__ __forceinline__ float score_of(uint32_t bits) {
    return __int_as_float(static_cast<int>(bits ^ (bits >> 31 ? 0x80000000u : 0xFFFFFFFFu)));
}

__device__ __forceinline__ uint64_t key_of(uint32_t bits, uint32_t index) {
    return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(~index);
}

// A row of logits; `vectors`: it begins at 16 bytes.
struct Row {
    const float* logits;
    int count;
    bool vectors;

    __device__ Row(const float* logits, int count)
        : logits(logits), count(count), vectors(reinterpret_cast<uintptr_t>(logits) % sizeof(float4) == 0) {}

    // Elements 4 * group ... 4 * group + 3, -inf beyond the end.
    __device__ __forceinline__ void load(int group, float (&values)[4]) const {
        const int first = 4 * group;
        if (vectors && first + 4 <= count) {
            const float4 four = reinterpret_cast<const float4*>(logits)[group];
            values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
        } else {
ICSEG_UNROLL
            for (int c = 0; c < 4; ++c) values[c] = first + c < count ? logits[first + c] : minus_infinity();
        }
    }
};

struct Summary {
    float most, logsumexp;
};

// The maximum and log(sum(exp(logits))), NaN counting as -inf; -inf of no elements, inf if one is.
template <int kThreads>
__device__ Summary summarise(const Row& row, DrawScratch& scratch) {
    float most = minus_infinity(), total = 0;
    for (int group = threadIdx.x; 4 * group < row.count; group += kThreads) {
        float l[4];
        row.load(group, l);
        float higher = most;
ICSEG_UNROLL
        for (int c = 0; c < 4; ++c) higher = l[c] > higher ? l[c] : higher;
        if (higher > most) {
            total *= expf(most - higher);
            most = higher;
        }
ICSEG_UNROLL
        for (int c = 0; c < 4; ++c) total += l[c] > minus_infinity() ? expf(l[c] - most) : 0.0f;
    }
    const float highest = reduce<kThreads>(most, scratch.partial, Larger());
    if (!(highest - highest == 0)) return {highest, highest};  // the same in every thread
    if (most < highest) total *= expf(most - highest);
    total = reduce<kThreads>(total, scratch.partial, Plus());
    return {highest, highest + logf(total)};
}

// A score that about m + 6 sqrt(m) + 10 seeded scores reach, m = most, if no weight dominates, else -inf: the number
// of exponentials E_i < w_i T is a sum of independent trials of mean just below T times the sum of the weights w_i.
__device__ inline float likely_floor(const Summary& row, int most) {
    const float m = static_cast<float>(most), wanted = m + 6 * sqrtf(m) + 10;
    const float floor = row.logsumexp - logf(wanted);
    return floor >= row.most ? floor : minus_infinity();
}

// Whether an element of logit `logit` may have a score above `floor` by its random word. Then logit plus noise exceeds
// it also before the sum is rounded. The exponential E of the noise -log E is at least v, the word as a fraction, so
// log2 v < (logit - floor) log2(e) =: x must hold, but for the error of the noise. With u = (word >> 8) * 2^-24 <= v, the
// bits of a positive float being at most 2^23 (log2 + 127), bits(u) <= 2^23 (x + 127) must hold, but for errors, which
// 1024 covers (csrc/cpu/kernels/draw.h).
// The scale 2^24 of u is taken into the constant. False for NaN and -inf.
__device__ __forceinline__ bool may_exceed(float logit, uint32_t word, float floor) {
    const float bits = static_cast<float>(__float_as_int(static_cast<float>(static_cast<int>(word >> 8))));
    return fmaf(logit - floor, 1.44269504f * 8388608, (127 + 24) * 8388608.0f + 1024) > bits;
}

// The score of element `index`, whatever it is.
__device__ inline float score_at(const Row& row, const Noise& noise, uint32_t index) {
    const float logit = row.logits[index];
    if (noise.values != nullptr) return logit + noise.values[index];
    if (!noise.seeded) return logit;
    uint32_t words[4];
    philox(noise, index / 4, words);
    const uint32_t c = index % 4;
    return logit + gumbel(c == 0 ? words[0] : c == 1 ? words[1] : c == 2 ? words[2] : words[3]);
}

// kChunks: whether a row may have more than one chunk.
template <int kThreads, int kGroups, bool kChunks>
struct Drawing {
    static constexpr int kChunk = kThreads * 4 * kGroups;
    static constexpr int kOwn = kChunks ? kMostKeys / kThreads : 0;  // keys of a thread that compete with a chunk's

    const Row& row;
    const Noise& noise;
    int most;
    DrawScratch& scratch;
    uint64_t* keys;
    int capacity;

    uint32_t bound;  // ordered bits that an element must reach
    float floor;     // the score below, which it must exceed
    int kept;        // keys

    uint32_t bits[4 * kGroups];  // of the chunk's elements; 0 where they are out

    __device__ uint32_t index_of(int first, int i) const {
        return static_cast<uint32_t>(first + 4 * (i / 4 * kThreads + static_cast<int>(threadIdx.x)) + i % 4);
    }

    // Scores of the chunk that begins at element `first`.
    __device__ __forceinline__ void score_chunk(int first) {
ICSEG_UNROLL
        for (int j = 0; j < kGroups; ++j) {
            const int group = first / 4 + j * kThreads + static_cast<int>(threadIdx.x);
ICSEG_UNROLL
            for (int c = 0; c < 4; ++c) bits[4 * j + c] = 0;
            if (group > (row.count - 1) / 4) continue;
            float score[4];
            row.load(group, score);
            if (noise.seeded) {
                uint32_t words[4];
                philox(noise, static_cast<uint32_t>(group), words);
ICSEG_UNROLL
                for (int c = 0; c < 4; ++c) {
                    score[c] = may_exceed(score[c], words[c], floor) ? score[c] + gumbel(words[c]) : minus_infinity();
                }
            } else if (noise.values != nullptr) {
ICSEG_UNROLL
                for (int c = 0; c < 4; ++c) {
                    if (4 * group + c < row.count) score[c] += noise.values[4 * group + c];
                }
            }
ICSEG_UNROLL
            for (int c = 0; c < 4; ++c) {
                const uint32_t b = score[c] > minus_infinity() ? ordered(score[c]) : 0;  // also for NaN
                bits[4 * j + c] = b >= bound ? b : 0;
            }
        }
    }

    // Appends `mine` keys of this thread, where there is room; at(i) is the i-th of `candidates` or 0.
    template <int kCandidates, typename At>
    __device__ __forceinline__ void append(const At& at) {
        int mine = 0, all;
ICSEG_UNROLL
        for (int i = 0; i < kCandidates; ++i) mine += at(i) != 0;
        const int below = sum_below(mine, &all);
        int place = 0;
        if (all != 0 && threadIdx.x % kWarp == 0) place = atomicAdd(&scratch.count, all);
        place = __shfl_sync(kEveryLane, place, 0) + below;
ICSEG_UNROLL
        for (int i = 0; i < kCandidates; ++i) {
            const uint64_t key = at(i);
            if (key == 0) continue;
            if (place < capacity) keys[place] = key;
            ++place;
        }
    }

    // Counts a digit of a key in the histogram, for all lanes that `counts`.
    __device__ __forceinline__ void count_digit(bool counts, uint32_t digit) {
        if (!__any_sync(kEveryLane, counts)) return;
        const unsigned peers = __match_any_sync(kEveryLane, counts ? digit : kDigits);
        if (counts && static_cast<int>(threadIdx.x % kWarp) == __ffs(peers) - 1) {
            atomicAdd(&scratch.histogram[digit], __popc(peers));
        }
    }

    // By the first warp: the digit that the `remaining`-th largest has, its rank among those of this digit, and their
    // number.
    __device__ __forceinline__ void find_digit(int remaining) {
        constexpr int kEach = kDigits / kWarp;
        const int top = kDigits - 1 - static_cast<int>(threadIdx.x) * kEach;
        int sum = 0, all;
        for (int i = 0; i < kEach; ++i) sum += scratch.histogram[top - i];
        int above = sum_below(sum, &all);
        if (above >= remaining || above + sum < remaining) return;
        int digit = top;
        while (above + scratch.histogram[digit] < remaining) above += scratch.histogram[digit--];
        scratch.digit = digit;
        scratch.remaining = remaining - above;
        scratch.bucket = scratch.histogram[digit];
    }

    // Keeps the `most` best of keys[0, kept) and the chunk's, and raises the bound.
    __device__ __forceinline__ void select(int first) {
        uint64_t own[kOwn + 1] = {};  // C++ has no empty arrays
ICSEG_UNROLL
        for (int i = 0; i < kOwn; ++i) {
            const int place = i * kThreads + static_cast<int>(threadIdx.x);
            own[i] = place < kept ? keys[place] : 0;
        }
        const auto candidate = [&](int i) {
            if (i < kOwn) return own[i];
            const uint32_t b = bits[i - kOwn];
            return b == 0 ? uint64_t(0) : key_of(b, index_of(first, i - kOwn));
        };
        uint64_t least = 0;  // the upper digits of the last one kept
        int shift = 64;
        for (int remaining = most; shift > 0;) {
            shift -= 8;
            for (int i = threadIdx.x; i < kDigits; i += kThreads) scratch.histogram[i] = 0;
            __syncthreads();
ICSEG_UNROLL
            for (int i = 0; i < kOwn + 4 * kGroups; ++i) {
                const uint64_t key = candidate(i);
                const bool counts = key != 0 && (key ^ least) >> shift >> 8 == 0;
                count_digit(counts, static_cast<uint32_t>(key >> shift) % kDigits);
            }
            __syncthreads();
            if (threadIdx.x < kWarp) find_digit(remaining);
            __syncthreads();
            remaining = scratch.remaining;
            least |= static_cast<uint64_t>(scratch.digit) << shift;
            if (scratch.bucket == remaining) break;
        }
        if (threadIdx.x == 0) scratch.count = 0;
        __syncthreads();
        append<kOwn + 4 * kGroups>([&](int i) {
            const uint64_t key = candidate(i);
            return key >= least ? key : uint64_t(0);
        });
        __syncthreads();  // else the next chunk's keys may take the places of these
        kept = most;
        const uint32_t reached = static_cast<uint32_t>(least >> 32);
        raise(shift <= 32 ? reached + 1 : reached);  // among equal scores, later elements come last
    }

    __device__ __forceinline__ void raise(uint32_t to) {
        bound = to > kMinusInfinityBits ? to : kMinusInfinityBits + 1;
        floor = score_of(bound - 1);
    }

    // Keys of at least `from`, of which the best `most` are right if there are as many.
    __device__ __forceinline__ void take(float from) {
        raise(ordered(from));
        kept = 0;
        if (threadIdx.x == 0) scratch.count = 0;
        __syncthreads();
        for (int first = 0; first < row.count; first += smaller(kChunk, row.count - first)) {
            score_chunk(first);
            append<4 * kGroups>([&](int i) { return bits[i] == 0 ? uint64_t(0) : key_of(bits[i], index_of(first, i)); });
            __syncthreads();
            const int total = scratch.count;
            __syncthreads();
            if (total > capacity) {
                select(first);
            } else {
                kept = total;
            }
        }
    }

    // Descending. Pairs less than two warps' worth apart are compared within a warp.
    __device__ __forceinline__ void sort() {
        int size = 1;
        while (size < kept) size *= 2;
        for (int i = kept + static_cast<int>(threadIdx.x); i < size; i += kThreads) keys[i] = 0;
        __syncthreads();
        for (int run = 2; run <= size; run *= 2) {
            for (int step = run / 2; step > 0; step /= 2) {
                for (int pair = threadIdx.x; pair < size / 2; pair += kThreads) {
                    const int low = 2 * pair - pair % step, high = low + step;  // pair % step: a power of two
                    const uint64_t a = keys[low], b = keys[high];
                    if ((a < b) == ((low & run) == 0)) keys[low] = b, keys[high] = a;
                }
                if (step > kWarp || (step == 1 && run >= 2 * kWarp)) {
                    __syncthreads();
                } else {
                    __syncwarp();
                }
            }
        }
        __syncthreads();
    }
};

// The `most` best of a row into keys[0, returned), sorted; fewer if no more can be drawn. `most` is 0 only of an empty
// row. `keys` of draw_capacity(most) are shared memory.
template <int kThreads, int kGroups, bool kChunks>
__device__ __forceinline__ int draw(const Row& row, const Noise& noise, int most, float guess, DrawScratch& scratch,
                                    uint64_t* keys, int capacity) {
    Drawing<kThreads, kGroups, kChunks> d{row, noise, most, scratch, keys, capacity, 0, 0, 0, {}};
    d.take(guess);
    if (d.kept < most && guess > minus_infinity()) d.take(minus_infinity());
    d.sort();
    return smaller(d.kept, most);
}

// What comes at place `j` of a draw of `found` keys: index and score, or -1 and -inf.
__device__ inline void drawn(const Row& row, const Noise& noise, const uint64_t* keys, int found, int64_t j,
                             int64_t* index, float* score) {
    *index = -1;
    *score = minus_infinity();
    if (j >= found) return;
    const uint32_t place = ~static_cast<uint32_t>(keys[j]);
    *index = place;
    *score = score_of(static_cast<uint32_t>(keys[j] >> 32));
    if (*score == 0) *score = score_at(row, noise, place);  // its sign
}

}  // namespace icseg_cuda
