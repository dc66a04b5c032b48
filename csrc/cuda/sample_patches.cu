// sample_patches: from an importance map to drawn windows, a sample by one block, its map in shared memory throughout.
#include "checks.h"
#include "draw.cuh"

namespace icseg_cuda {
namespace {

constexpr float kEpsilon = 1e-6f;
constexpr int32_t kNoPatch = -(1 << 30);

struct SampleArguments {
    const float* maps;
    const float* noise;
    const int64_t* seed;
    const double* temperature;
    int64_t* indices;
    float* scores;
    int32_t* coords;
    int64_t stride_batch, stride_y, stride_x, noise_stride;
    uint64_t seed_value;
    float temperature_value;
    bool seeded;
    int height, width, before, patch, stride;
    int padded_height, padded_width;
    int every_rows, every_columns;  // windows at stride 1
    int rows, columns;              // windows kept
    int tap_count, k, capacity;
    int map_floats;  // of each of the two maps; the one that is not the logits holds the keys at last
    float taps[ICSEG_CUDA_MOST_TAPS];
};

// What a block keeps in shared memory, before the two maps.
struct Scratch {
    DrawScratch draw;
    float taps[ICSEG_CUDA_MOST_TAPS + 1];
};
static_assert(sizeof(Scratch) + 8 * ICSEG_CUDA_MOST_PIXELS <= 163 << 10, "two maps fit a block of sm_80, sm_90 or sm_100");
static_assert(sizeof(Scratch) + 8 * 12288 <= 99 << 10, "as icseg_kernels/patches/sample_cuda.py says of others");
static_assert(sizeof(Scratch) % sizeof(float4) == 0 && alignof(Scratch) <= alignof(float4), "the maps are aligned");

// A thread's elements of [rows, width]: kThreads apart, each with its row and column.
template <int kThreads>
struct Walk {
    int width, end, rows_a_step, columns_a_step, place, y, x;

    __device__ Walk(int rows, int width)
        : width(width),
          end(rows * width),
          rows_a_step(kThreads / width),
          columns_a_step(kThreads % width),
          place(static_cast<int>(threadIdx.x)),
          y(place / width),
          x(place % width) {}

    __device__ __forceinline__ bool goes_on() const { return place < end; }

    __device__ __forceinline__ void step() {
        place += kThreads;
        y += rows_a_step;
        x += columns_a_step;
        if (x >= width) x -= width, ++y;
    }
};

// From one map to the other and back.
template <int kThreads>
struct Chain {
    const SampleArguments& a;
    Scratch& scratch;
    float *map, *other;

    // What was written to the other map is the map.
    __device__ __forceinline__ void swap() {
        __syncthreads();
        float* const before = map;
        map = other, other = before;
    }

    // The padded map; pixels that are not finite become its lowest or highest.
    __device__ void load(const float* from) {
        bool odd = false;
        const auto pixel_at = [&](const Walk<kThreads>& at, float* pixel) {
            const int y = at.y - a.before, x = at.x - a.before;
            if (y < 0 || y >= a.height || x < 0 || x >= a.width) return false;
            *pixel = from[y * a.stride_y + x * a.stride_x];
            return true;
        };
        for (Walk<kThreads> at(a.padded_height, a.padded_width); at.goes_on(); at.step()) {
            float pixel = 0;
            pixel_at(at, &pixel);
            odd = odd || !(pixel - pixel == 0);
            other[at.place] = pixel;
        }
        if (__syncthreads_or(odd)) {
            float lowest = -minus_infinity(), highest = minus_infinity();
            for (Walk<kThreads> at(a.padded_height, a.padded_width); at.goes_on(); at.step()) {
                float pixel;
                if (!pixel_at(at, &pixel) || !(pixel - pixel == 0)) continue;
                lowest = Smaller()(lowest, pixel);
                highest = Larger()(highest, pixel);
            }
            lowest = reduce<kThreads>(lowest, scratch.draw.partial, Smaller());
            highest = reduce<kThreads>(highest, scratch.draw.partial, Larger());
            if (lowest > highest) lowest = highest = 0;  // none is finite
            for (Walk<kThreads> at(a.padded_height, a.padded_width); at.goes_on(); at.step()) {
                const float pixel = other[at.place];
                if (!(pixel - pixel == 0)) other[at.place] = pixel == -minus_infinity() ? highest : lowest;
            }
        }
        swap();
    }

    // Maxima over every window, by its corner: along rows, then columns, over twice as many pixels each time. One that
    // runs into the next row, or beyond the end, belongs to no window.
    __device__ void pool() {
        const int pixels = a.padded_height * a.padded_width;
        for (int axis = 0; axis < 2; ++axis) {
            for (int span = 1; span < a.patch;) {
                const int further = smaller(span, a.patch - span);
                const int offset = axis == 0 ? further : further * a.padded_width;
                for (int p = threadIdx.x; p < pixels; p += kThreads) {
                    other[p] = Larger()(map[p], map[smaller(p + offset, pixels - 1)]);
                }
                swap();
                span += further;
            }
        }
    }

    // The windows' maxima from 0 to 1.
    __device__ void rescale() {
        float lowest = -minus_infinity(), highest = minus_infinity();
        for (Walk<kThreads> at(a.every_rows, a.padded_width); at.goes_on(); at.step()) {
            if (at.x >= a.every_columns) continue;
            lowest = Smaller()(lowest, map[at.place]);
            highest = Larger()(highest, map[at.place]);
        }
        lowest = reduce<kThreads>(lowest, scratch.draw.partial, Smaller());
        highest = reduce<kThreads>(highest, scratch.draw.partial, Larger());
        const float scale = highest - lowest + kEpsilon;
        for (int p = threadIdx.x; p < a.every_rows * a.padded_width; p += kThreads) {
            other[p] = (map[p] - lowest) / scale;
        }
        swap();
    }

    // The blur around `at` of `size` elements `pitch` apart, zeros outside, from the first tap to the last.
    __device__ __forceinline__ float blurred(const float* line, int pitch, int at, int size) const {
        const int radius = a.tap_count / 2;
        const int first = at > radius ? at - radius : 0, last = smaller(size, at + radius + 1);
        float total = 0;
        for (int j = first; j < last; ++j) total = total + line[j * pitch] * scratch.taps[j - at + radius];
        return total;
    }

    // The logits of the windows kept, contiguous.
    __device__ void soften(float temperature) {
        int pitch = a.padded_width, stride_y = a.stride;
        if (a.tap_count > 1) {
            for (Walk<kThreads> at(a.rows, a.every_columns); at.goes_on(); at.step()) {
                other[at.place] = blurred(map + at.x, pitch, at.y * a.stride, a.every_rows);
            }
            swap();
            pitch = a.every_columns, stride_y = 1;
        }
        for (Walk<kThreads> at(a.rows, a.columns); at.goes_on(); at.step()) {
            const float* row = map + at.y * stride_y * pitch;
            const int x = at.x * a.stride;
            const float value = a.tap_count > 1 ? blurred(row, 1, x, a.every_columns) : row[x];
            other[at.place] = value / temperature;
        }
        swap();
    }
};

template <int kThreads, int kGroups, bool kChunks>
__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const __grid_constant__ SampleArguments a) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(shared_memory());
    float* maps = reinterpret_cast<float*>(&scratch + 1);
    const int64_t b = blockIdx.x;
    for (int t = threadIdx.x; t < a.tap_count; t += kThreads) scratch.taps[t] = a.taps[t];
    Chain<kThreads> chain{a, scratch, maps, maps + a.map_floats};
    chain.load(a.maps + b * a.stride_batch);
    chain.pool();
    chain.rescale();
    chain.soften(a.temperature == nullptr ? a.temperature_value : static_cast<float>(*a.temperature));
    uint64_t* keys = reinterpret_cast<uint64_t*>(chain.other);
    const Row row(chain.map, a.rows * a.columns);
    const Noise noise{a.noise == nullptr ? nullptr : a.noise + b * a.noise_stride, a.seeded,
                      a.seeded && a.seed != nullptr ? static_cast<uint64_t>(*a.seed) : a.seed_value, blockIdx.x};
    const float guess = a.seeded ? likely_floor(summarise<kThreads>(row, scratch.draw), a.k) : minus_infinity();
    const int found = draw<kThreads, kGroups, kChunks>(row, noise, a.k, guess, scratch.draw, keys, a.capacity);
    for (int j = threadIdx.x; j < a.k; j += kThreads) {
        int64_t index;
        float score;
        drawn(row, noise, keys, found, j, &index, &score);
        const int64_t n = b * a.k + j;
        const int place = static_cast<int>(index);
        a.indices[n] = index;
        a.scores[n] = score;
        a.coords[2 * n] = place < 0 ? kNoPatch : place / a.columns * a.stride - a.before;
        a.coords[2 * n + 1] = place < 0 ? kNoPatch : place % a.columns * a.stride - a.before;
    }
}

// The sizes, and what follows from them; an error code if they are impossible.
int plan(const icseg_cuda_windows& w, int64_t k, SampleArguments& a) {
    const std::initializer_list<int64_t> sizes = {w.batch,  w.height, w.width,     w.patch, w.stride,
                                                  w.before, w.after,  w.tap_count, k};
    if (any_negative(sizes)) return ICSEG_CUDA_NEGATIVE_SIZE;
    for (const int64_t size : sizes) {
        if (size > INT_MAX) return ICSEG_CUDA_TOO_LARGE;
    }
    const int64_t padded_height = w.height + w.before + w.after, padded_width = w.width + w.before + w.after;
    if (w.patch < 1 || w.stride < 1 || w.height < 1 || w.width < 1 || w.tap_count % 2 == 0 ||
        w.patch > padded_height || w.patch > padded_width) {
        return ICSEG_CUDA_WINDOWS;
    }
    if (padded_height > ICSEG_CUDA_MOST_PIXELS / padded_width || w.tap_count > ICSEG_CUDA_MOST_TAPS) {
        return ICSEG_CUDA_TOO_LARGE;
    }
    const int64_t every_rows = padded_height - w.patch + 1, every_columns = padded_width - w.patch + 1;
    const int64_t rows = (every_rows - 1) / w.stride + 1, columns = (every_columns - 1) / w.stride + 1;
    if (const int code = checked_draw(w.batch, rows * columns, k, k)) return code;
    a.stride_batch = w.stride_batch, a.stride_y = w.stride_y, a.stride_x = w.stride_x;
    a.height = static_cast<int>(w.height), a.width = static_cast<int>(w.width);
    a.before = static_cast<int>(w.before), a.patch = static_cast<int>(w.patch), a.stride = static_cast<int>(w.stride);
    a.padded_height = static_cast<int>(padded_height), a.padded_width = static_cast<int>(padded_width);
    a.every_rows = static_cast<int>(every_rows), a.every_columns = static_cast<int>(every_columns);
    a.rows = static_cast<int>(rows), a.columns = static_cast<int>(columns);
    a.tap_count = static_cast<int>(w.tap_count), a.k = static_cast<int>(k), a.capacity = draw_capacity(k);
    const int pixels = a.padded_height * a.padded_width, key_floats = 2 * a.capacity;
    a.map_floats = pixels > key_floats ? (pixels + 3) / 4 * 4 : key_floats;
    a.temperature = w.temperature, a.temperature_value = static_cast<float>(w.temperature_value);
    for (int t = 0; t < a.tap_count; ++t) a.taps[t] = a.tap_count == 1 ? 1.0f : w.taps[t];
    return ICSEG_CUDA_OK;
}

}  // namespace
}  // namespace icseg_cuda

int icseg_cuda_sample_patches_f32(const icseg_cuda_windows* windows, const float* maps, const float* noise,
                                  int64_t noise_stride, const int64_t* seed, int64_t k, int64_t seeded,
                                  uint64_t seed_value, int64_t* indices, float* scores, int32_t* coords, void* stream) {
    using namespace icseg_cuda;
    SampleArguments a;
    if (const int code = plan(*windows, k, a)) return code;
    if (k == 0) return ICSEG_CUDA_OK;
    a.maps = maps, a.noise = noise, a.noise_stride = noise_stride, a.seed = seed, a.seed_value = seed_value;
    a.seeded = seeded != 0, a.indices = indices, a.scores = scores, a.coords = coords;
    const int bytes = static_cast<int>(sizeof(Scratch) + 2 * a.map_floats * sizeof(float));
    if (a.padded_height * a.padded_width <= 1024) {
        return launch(sample_kernel<256, 1, false>, windows->batch, 256, bytes, stream, a);
    }
    return launch(sample_kernel<1024, 2, true>, windows->batch, 1024, bytes, stream, a);
}
