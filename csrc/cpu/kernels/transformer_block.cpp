#include "transformer_block.h"

#include "../parallel.h"
#include "gelu.h"
#include "matrix.h"
#include "softmax.h"

namespace icseg {
namespace ICSEG_ISA {
namespace {

constexpr int64_t kLane = kLanes<float>;
static_assert(kRowStep % kLane == 0 && kWidestPanel % kPanel<float> == 0, "rows and panels are whole vectors");

// A tile is some rows by one or two vectors of columns: what the registers hold, beside a panel's row.
#ifdef __AVX512F__
template <int64_t Vectors>
constexpr int64_t kMostRows = 14;
#else
template <int64_t Vectors>
constexpr int64_t kMostRows = 12 / Vectors;
#endif

// Addresses of up to so many rows, four of them from one pointer.
template <int64_t Rows>
struct RowsOf {
    const float* group[(Rows + 3) / 4];
    int64_t step;

    RowsOf(const float* first, int64_t step) : step(step) {
        for (int64_t g = 0; g < (Rows + 3) / 4; ++g) group[g] = first + 4 * g * step;
    }
    float at(int64_t row, int64_t column) const { return group[row / 4][row % 4 * step + column]; }
};

// What the tiles of a product share.
struct Product {
    const float* left;  // rows of `depth`
    int64_t left_row, depth;
    float factor;
    bool adds;  // to what is there
    float* to;
    int64_t to_row, width;  // of the panel's columns, so many are wanted
};

// to = factor * (the panel's first row + left x its other rows), added up in the order of the depth for every size of
// tile.
template <int64_t Vectors, int64_t Rows>
void tile(const Product& product, int64_t row, const float* panel) {
    constexpr int64_t kWidth = Vectors * kLane;
    const RowsOf<Rows> left(product.left + row * product.left_row, product.left_row);
    Vector<float> sum[Rows][Vectors];
#pragma GCC unroll 16
    for (int64_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
        for (int64_t v = 0; v < Vectors; ++v) sum[r][v] = load(panel + v * kLane);
    }
    const int64_t depth = product.depth;
    for (int64_t k = 0; k < depth; ++k) {
        panel += kWidth;
        Vector<float> column[Vectors];
#pragma GCC unroll 2
        for (int64_t v = 0; v < Vectors; ++v) column[v] = load(panel + v * kLane);
#pragma GCC unroll 16
        for (int64_t r = 0; r < Rows; ++r) {
            const Vector<float> factor = broadcast(left.at(r, k));
#pragma GCC unroll 2
            for (int64_t v = 0; v < Vectors; ++v) sum[r][v] = fma(factor, column[v], sum[r][v]);
        }
    }
    float* to = product.to + row * product.to_row;
    const int64_t to_row = product.to_row, last = product.width - (Vectors - 1) * kLane;
    const Vector<float> factor = broadcast(product.factor);
    const bool adds = product.adds;
    if (last == kLane) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < Rows; ++r, to += to_row) {
#pragma GCC unroll 2
            for (int64_t v = 0; v < Vectors; ++v) {
                const Vector<float> value = sum[r][v] * factor;
                store(to + v * kLane, adds ? load(to + v * kLane) + value : value);
            }
        }
        return;
    }
    for (int64_t r = 0; r < Rows; ++r, to += to_row) {
        for (int64_t v = 0; v < Vectors; ++v) {
            const int64_t some = v + 1 < Vectors ? kLane : last;
            const Vector<float> value = sum[r][v] * factor;
            store_up_to(to + v * kLane, adds ? load_up_to(to + v * kLane, some) + value : value, some);
        }
    }
}

using Tile = void (*)(const Product&, int64_t, const float*);

template <int64_t Vectors, int64_t Rows = kMostRows<Vectors>>
inline Tile tile_of(int64_t rows) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return tile_of<Vectors, Rows - 1>(rows);
    }
    return tile<Vectors, Rows>;
}

// body(first, rows) for tiles of as equal a size as can be.
template <typename Body>
inline void for_each_tile(int64_t rows, int64_t most, const Body& body) {
    const int64_t tiles = (rows + most - 1) / most;
    for (int64_t n = 0, first = 0; n < tiles; ++n) {
        const int64_t count = rows / tiles + (n < rows % tiles);
        body(first, count);
        first += count;
    }
}

template <int64_t Vectors>
inline void multiply_panel(const Product& product, int64_t rows, const float* panel) {
    for_each_tile(rows, kMostRows<Vectors>, [&](int64_t first, int64_t count) {
        tile_of<Vectors>(count)(product, first, panel);
    });
}

#ifdef __AVX2__
// Four elements of each of kLane rows, from column(lane of 128 bits, row of four) on, as four vectors.
template <typename Column>
inline ICSEG_INLINE void transpose_four(const Column& column, float* to, int64_t stride) {
    Vector<float> x[4];
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
#ifdef __AVX512F__
        x[i] = _mm512_castps128_ps512(_mm_loadu_ps(column(0, i)));
        x[i] = _mm512_mask_broadcast_f32x4(x[i], 0x00f0, _mm_loadu_ps(column(1, i)));
        x[i] = _mm512_mask_broadcast_f32x4(x[i], 0x0f00, _mm_loadu_ps(column(2, i)));
        x[i] = _mm512_mask_broadcast_f32x4(x[i], 0xf000, _mm_loadu_ps(column(3, i)));
#else
        x[i] = _mm256_castps128_ps256(_mm_loadu_ps(column(0, i)));
        x[i] = _mm256_insertf128_ps(x[i], _mm_loadu_ps(column(1, i)), 1);
#endif
    }
#ifdef __AVX512F__
    const __m512 a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpacklo_ps(x[2], x[3]);
    const __m512 c = _mm512_unpackhi_ps(x[0], x[1]), d = _mm512_unpackhi_ps(x[2], x[3]);
    store(to, (Vector<float>)_mm512_unpacklo_pd((__m512d)a, (__m512d)b));
    store(to + stride, (Vector<float>)_mm512_unpackhi_pd((__m512d)a, (__m512d)b));
    store(to + 2 * stride, (Vector<float>)_mm512_unpacklo_pd((__m512d)c, (__m512d)d));
    store(to + 3 * stride, (Vector<float>)_mm512_unpackhi_pd((__m512d)c, (__m512d)d));
#else
    const __m256 a = _mm256_unpacklo_ps(x[0], x[1]), b = _mm256_unpacklo_ps(x[2], x[3]);
    const __m256 c = _mm256_unpackhi_ps(x[0], x[1]), d = _mm256_unpackhi_ps(x[2], x[3]);
    store(to, (Vector<float>)_mm256_unpacklo_pd((__m256d)a, (__m256d)b));
    store(to + stride, (Vector<float>)_mm256_unpackhi_pd((__m256d)a, (__m256d)b));
    store(to + 2 * stride, (Vector<float>)_mm256_unpacklo_pd((__m256d)c, (__m256d)d));
    store(to + 3 * stride, (Vector<float>)_mm256_unpackhi_pd((__m256d)c, (__m256d)d));
#endif
}
#endif

// A panel of `width` columns, each `depth` consecutive elements from rows[i] on, after a row of `bias` (NULL: zeros).
void pack(const float* const* rows, int64_t width, int64_t depth, const float* bias, float* panel) {
    const int64_t stride = width <= kLane ? kLane : 2 * kLane;
    for (int64_t i = 0; i < stride; ++i) panel[i] = bias != nullptr && i < width ? bias[i] : 0.0f;
    panel += stride;
#ifdef __AVX2__
    if (width == stride && depth % 4 == 0) {
        for (int64_t first = 0; first < width; first += kLane) {
            const int64_t step = rows[first + 1] - rows[first];
            bool even = true;
            for (int64_t i = 1; i < kLane; ++i) even = even && rows[first + i] - rows[first] == i * step;
            const float *one[kLane / 4], *const* some = rows + first;
            for (int64_t i = 0; i < kLane / 4; ++i) one[i] = rows[first + 4 * i];
            for (int64_t d = 0; d < depth; d += 4) {
                float* to = panel + first + d * stride;
                if (even) {
                    transpose_four([&](int64_t l, int64_t i) ICSEG_INLINE { return one[l] + i * step + d; }, to, stride);
                } else {
                    transpose_four([&](int64_t l, int64_t i) ICSEG_INLINE { return some[4 * l + i] + d; }, to, stride);
                }
            }
        }
        return;
    }
#endif
    transpose<float>(rows, width, depth, 1, panel, stride);
}

void multiply(const Product& product, int64_t rows, const float* panel) {
    (product.width <= kLane ? multiply_panel<1> : multiply_panel<2>)(product, rows, panel);
}

// to[r] = factor * (weight left[r] + bias), of `outputs` elements.
struct Linear {
    const float *weight, *bias;
    int64_t inputs, outputs;

    void apply(const float* left, int64_t left_row, int64_t rows, float* to, int64_t to_row, float* panel,
               float factor = 1, bool adds = false) const {
        for (int64_t first = 0; first < outputs; first += kPanel<float>) {
            const int64_t width = smaller(kPanel<float>, outputs - first);
            const float* columns[kPanel<float>];
            for (int64_t i = 0; i < width; ++i) columns[i] = weight + (first + i) * inputs;
            pack(columns, width, inputs, bias + first, panel);
            multiply({left, left_row, inputs, factor, adds, to + first, to_row, width}, rows, panel);
        }
    }
};

// Mean 0, variance 1, then the norm's weight and bias.
void normalise(const float* x, const float* weight, const float* bias, int64_t count, double eps, float* to) {
    const int64_t whole = count / kLane * kLane, rest = count - whole;
    Vector<float> sum = load_first(x + whole, rest);
    for (int64_t i = 0; i < whole; i += kLane) sum += load(x + i);
    const float mean = sum_of_lanes<float>(sum) / static_cast<float>(count);
    float ends[kLane] = {};
    for (int64_t i = 0; i < rest; ++i) ends[i] = (x[whole + i] - mean) * (x[whole + i] - mean);
    Vector<float> squares = load(ends);
    for (int64_t i = 0; i < whole; i += kLane) {
        const Vector<float> d = load(x + i) - mean;
        squares = fma(d, d, squares);
    }
    const float variance = sum_of_lanes<float>(squares) / static_cast<float>(count);
    const float scale = static_cast<float>(1 / sqrt(static_cast<double>(variance) + eps));
    for (int64_t i = 0; i < whole; i += kLane) {
        store(to + i, fma((load(x + i) - mean) * scale, load(weight + i), load(bias + i)));
    }
    for (int64_t i = whole; i < count; ++i) to[i] = fma((x[i] - mean) * scale, weight[i], bias[i]);
}

// What the tiles of a product of probabilities and values share.
struct Values {
    const float* scores;
    int64_t scores_row;
    const float* const* keys;
    int64_t count, offset;  // a value begins so many elements after its key
    float* to;
    int64_t to_row;
    const float *factor, *finish;  // of what is there (NULL: nothing is), and of the sum
};

// to = (to * factor + sum of probability * value) * finish, of up to so many columns.
template <int64_t Vectors, bool kWhole, int64_t Rows>
void value_tile(const Values& values, int64_t row, int64_t width) {
    const RowsOf<Rows> left(values.scores + row * values.scores_row, values.scores_row);
    const int64_t last = width - (Vectors - 1) * kLane, count = values.count, offset = values.offset;
    Vector<float> sum[Rows][Vectors] = {};
    for (int64_t k = 0; k < count; ++k) {
        const float* from = values.keys[k] + offset;
        Vector<float> column[Vectors];
#pragma GCC unroll 2
        for (int64_t v = 0; v < Vectors; ++v) {
            column[v] = kWhole || v + 1 < Vectors ? load(from + v * kLane) : load_first(from + v * kLane, last);
        }
#pragma GCC unroll 16
        for (int64_t r = 0; r < Rows; ++r) {
            const Vector<float> factor = broadcast(left.at(r, k));
#pragma GCC unroll 2
            for (int64_t v = 0; v < Vectors; ++v) sum[r][v] = fma(factor, column[v], sum[r][v]);
        }
    }
    float* to = values.to + row * values.to_row;
    for (int64_t r = 0; r < Rows; ++r, to += values.to_row) {
        for (int64_t v = 0; v < Vectors; ++v) {
            const int64_t some = kWhole || v + 1 < Vectors ? kLane : last;
            Vector<float> all = sum[r][v];
            if (values.factor) all = fma(load_up_to(to + v * kLane, some), broadcast(values.factor[row + r]), all);
            store_up_to(to + v * kLane, all * values.finish[row + r], some);
        }
    }
}

using ValueTile = void (*)(const Values&, int64_t, int64_t);

template <int64_t Vectors, bool kWhole, int64_t Rows = kMostRows<Vectors>>
inline ValueTile value_tile_of(int64_t rows) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return value_tile_of<Vectors, kWhole, Rows - 1>(rows);
    }
    return value_tile<Vectors, kWhole, Rows>;
}

template <int64_t Vectors, bool kWhole>
void add_panel(const Values& values, int64_t rows, int64_t width) {
    for_each_tile(rows, kMostRows<Vectors>, [&](int64_t first, int64_t count) {
        value_tile_of<Vectors, kWhole>(count)(values, first, width);
    });
}

void add_values(Values values, int64_t rows, int64_t width) {
    for (int64_t first = 0; first < width; first += kPanel<float>) {
        const int64_t columns = smaller(kPanel<float>, width - first);
        const bool whole = columns % kLane == 0;
        if (columns <= kLane) {
            (whole ? add_panel<1, true> : add_panel<1, false>)(values, rows, columns);
        } else {
            (whole ? add_panel<2, true> : add_panel<2, false>)(values, rows, columns);
        }
        values.to += columns, values.offset += columns;
    }
}

struct Slot {
    const TransformerBlock& block;
    const icseg_block& call;
    float *queries, *rows, *hidden, *panel, *scores;
    const float **all_keys, **seen_keys;

    Slot(const TransformerBlock& block, int64_t n) : block(block), call(block.call), queries(block.workspace) {
        float* scratch = queries + block.tokens * block.pitch + n * block.scratch;
        rows = scratch + block.rows, hidden = scratch + block.hidden, panel = scratch + block.panel;
        scores = scratch + block.scores;
        all_keys = reinterpret_cast<const float**>(scratch + block.all_keys);
        seen_keys = reinterpret_cast<const float**>(scratch + block.seen_keys);
    }

    // Keys and values, and queries, of some tokens.
    void project(int64_t first, int64_t count) const {
        const int64_t dim = call.dim, pitch = block.pitch;
        for (int64_t r = 0; r < count; ++r) {
            const int64_t b = (first + r) / call.count, n = (first + r) % call.count;
            normalise(call.tokens + b * call.stride_batch + n * call.stride_token, call.norm_attention_weight,
                      call.norm_attention_bias, dim, call.eps, rows + r * pitch);
        }
        const Linear key_value{call.key_value_weight, call.key_value_bias, dim, 2 * dim};
        key_value.apply(rows, pitch, count, block.own + first * 2 * dim, 2 * dim, panel);
        const float scale = static_cast<float>(1 / sqrt(static_cast<double>(dim / call.heads)));
        const Linear query{call.query_weight, call.query_bias, dim, dim};
        query.apply(rows, pitch, count, queries + first * pitch, pitch, panel, scale);
    }

    // All that follows, of some tokens.
    void finish(int64_t first, int64_t count) const {
        const int64_t dim = call.dim, pitch = block.pitch;
        float* out = block.out + first * dim;
        for (int64_t r = 0; r < count;) {
            const int64_t b = (first + r) / call.count, n = (first + r) % call.count;
            const int64_t some = smaller(call.count - n, count - r);
            const float* tokens = call.tokens + b * call.stride_batch + n * call.stride_token;
            for (int64_t i = 0; i < some; ++i) {
                std::memcpy(out + (r + i) * dim, tokens + i * call.stride_token, dim * sizeof(float));
            }
            attend(queries + (first + r) * pitch, some, list_keys(b), rows + r * pitch);
            r += some;
        }
        const Linear projection{call.out_weight, call.out_bias, dim, dim};
        projection.apply(rows, pitch, count, out, dim, panel, 1, true);
        for (int64_t r = 0; r < count; ++r) {
            normalise(out + r * dim, call.norm_mlp_weight, call.norm_mlp_bias, dim, call.eps, rows + r * pitch);
        }
        const Linear mlp_in{call.mlp_in_weight, call.mlp_in_bias, dim, call.hidden};
        mlp_in.apply(rows, pitch, count, hidden, block.hidden_pitch, panel);
        for (int64_t r = 0; r < count; ++r) {
            float* row = hidden + r * block.hidden_pitch;
            for (int64_t i = 0; i < call.hidden; i += kLane) {
                const int64_t some = smaller(kLane, call.hidden - i);
                store_up_to(row + i, gelu<float>(load_up_to(row + i, some)), some);
            }
        }
        const Linear mlp_out{call.mlp_out_weight, call.mlp_out_bias, call.hidden, dim};
        mlp_out.apply(hidden, block.hidden_pitch, count, out, dim, panel, 1, true);
    }

private:
    // Where the keys lie that a sample's tokens see; returns how many.
    int64_t list_keys(int64_t b) const {
        const bool indexed = call.index_bytes != 0;
        const float** next = indexed ? all_keys : seen_keys;
        for (int64_t i = 0; i < block.pieces; ++i) {
            const icseg_block_memory& piece = block.memory[i];
            const float* from = piece.data + b * piece.stride_batch;
            for (int64_t n = 0; n < piece.tokens; ++n) *next++ = from + n * piece.stride_token;
        }
        const float* from = block.own + b * call.count * 2 * call.dim;
        for (int64_t n = 0; n < call.count; ++n) *next++ = from + n * 2 * call.dim;
        if (!indexed) return block.keys;
        int64_t seen = 0;
        for (int64_t j = 0; j < call.listed; ++j) {
            const int64_t at = b * call.stride_index_batch + j * call.stride_index_entry;
            const int64_t key = call.index_bytes == 4 ? static_cast<const int32_t*>(call.index)[at]
                                                      : static_cast<const int64_t*>(call.index)[at];
            if (key >= 0 && key < block.keys) seen_keys[seen++] = all_keys[key];
        }
        return seen;
    }

    // to = softmax(queries keys^T) values, head by head; zeros if no key is seen.
    void attend(const float* from, int64_t count, int64_t seen, float* to) const {
        const int64_t dim = call.dim / call.heads, pitch = block.pitch, scores_row = block.scores_pitch;
        if (seen == 0) {
            for (int64_t r = 0; r < count; ++r) std::memset(to + r * pitch, 0, call.dim * sizeof(float));
            return;
        }
        float most[kMostTokens], total[kMostTokens], factor[kMostTokens], finish[kMostTokens];
        for (int64_t head = 0; head < call.heads; ++head) {
            const int64_t offset = head * dim;
            for (int64_t r = 0; r < count; ++r) most[r] = -static_cast<float>(INFINITY), total[r] = 0;
            for (int64_t first = 0; first < seen; first += kMostKeys) {
                const int64_t keys = smaller(kMostKeys, seen - first);
                for (int64_t j = 0; j < keys; j += kPanel<float>) {
                    const int64_t width = smaller(kPanel<float>, keys - j);
                    const float* columns[kPanel<float>];
                    for (int64_t i = 0; i < width; ++i) columns[i] = seen_keys[first + j + i] + offset;
                    pack(columns, width, dim, nullptr, panel);
                    multiply({from + offset, pitch, dim, 1, false, scores + j, scores_row, width}, count, panel);
                }
                const bool last = first + keys == seen;
                for (int64_t r = 0; r < count; ++r) {
                    factor[r] = exponentials<float>(scores + r * scores_row, keys, most[r], total[r]);
                    finish[r] = !last ? 1 : total[r] == 0 ? 0 : 1 / total[r];
                }
                add_values({scores, scores_row, seen_keys + first, keys, call.dim + offset, to + offset, pitch,
                            first == 0 ? nullptr : factor, finish},
                           count, dim);
            }
        }
    }
};

// body(first, count) for a slot's share of the tokens, not too many at a time.
template <typename Body>
inline void share(const TransformerBlock& block, const Body& body) {
    parallel_for(block.slots, block.work, [&](int64_t n) {
        const Slot slot(block, n);
        const int64_t each = block.tokens / block.slots, more = block.tokens % block.slots;
        const int64_t begin = n * each + smaller(n, more);
        for_each_tile(each + (n < more), block.at_once, [&](int64_t first, int64_t count) {
            body(slot, begin + first, count);
        });
    });
}

}  // namespace

void transformer_block(const TransformerBlock& block) {
    share(block, [](const Slot& slot, int64_t first, int64_t count) { slot.project(first, count); });
    share(block, [](const Slot& slot, int64_t first, int64_t count) { slot.finish(first, count); });
}

}  // namespace ICSEG_ISA
}  // namespace icseg
