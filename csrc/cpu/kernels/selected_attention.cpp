#include "selected_attention.h"

#include "../parallel.h"
#include "matrix.h"
#include "softmax.h"

namespace {

// std::log(float) is a weak function of the standard library's headers: see isa.h.
inline float log_of(float x) { return logf(x); }
inline double log_of(double x) { return log(x); }

}  // namespace

namespace icseg {
namespace ICSEG_ISA {
namespace {

// Elements from one query's scores to the next one's, an odd number of cache lines: of an even one, a tile's rows would
// share few sets of the cache.
template <typename Real>
constexpr int64_t kScoresRow = 31 * 64 / static_cast<int64_t>(sizeof(Real));
// Keys at a time: whole panels.
template <typename Real>
constexpr int64_t kMostKeys = 30 * 64 / static_cast<int64_t>(sizeof(Real));

// Rows of one head, perhaps turned.
template <typename Real>
struct Rows {
    const Real *data, *cos = nullptr, *sin = nullptr;
    int64_t row, column, cos_row = 0, cos_column = 0, sin_row = 0, sin_column = 0, width;

    Rows(const icseg_heads& view, int64_t batch, int64_t head, int64_t width)
        : data(of(view, batch, head)), row(view.stride_row), column(view.stride_column), width(width) {}

    Rows(const icseg_heads& view, const icseg_heads& cosines, const icseg_heads& sines, int64_t batch, int64_t head,
         int64_t width)
        : Rows(view, batch, head, width) {
        if (cosines.data == nullptr || sines.data == nullptr) return;
        cos = of(cosines, batch, head), sin = of(sines, batch, head);
        cos_row = cosines.stride_row, cos_column = cosines.stride_column;
        sin_row = sines.stride_row, sin_column = sines.stride_column;
    }

    void copy(int64_t n, Real* to) const {
        const Real* from = data + n * row;
        if (cos != nullptr) {
            turn(from, column, n, 1, to);
        } else if (column == 1) {
            if (width > 0) std::memcpy(to, from, width * sizeof(Real));  // else `from` may be null
        } else {
            for (int64_t i = 0; i < width; ++i) to[i] = from[i * column];
        }
    }

    // Row n in memory, or a copy at `buffer`.
    const Real* at(int64_t n, Real* buffer) const {
        if (column == 1 && cos == nullptr) return data + n * row;
        copy(n, buffer);
        return buffer;
    }

    // from, a gradient of row n as it was turned, as one of the row.
    void turn_back(const Real* from, int64_t n, Real* to) const {
        if (cos != nullptr) {
            turn(from, 1, n, -1, to);
        } else if (width > 0) {  // else `to` may be null
            std::memcpy(to, from, width * sizeof(Real));
        }
    }

  private:
    static const Real* of(const icseg_heads& view, int64_t batch, int64_t head) {
        return static_cast<const Real*>(view.data) + batch * view.stride_batch + head * view.stride_head;
    }

    void turn(const Real* __restrict__ from, int64_t stride, int64_t n, Real direction, Real* __restrict__ to) const {
        const Real *c = cos + n * cos_row, *s = sin + n * sin_row;
        if (stride == 1 && cos_column == 1 && sin_column == 1) {
            for (int64_t i = 0; i < width / 2; ++i) {
                const Real even = from[2 * i], odd = from[2 * i + 1], sine = direction * s[i];
                to[2 * i] = even * c[i] - odd * sine;
                to[2 * i + 1] = even * sine + odd * c[i];
            }
            return;
        }
        for (int64_t i = 0; i < width / 2; ++i) {
            const Real even = from[2 * i * stride], odd = from[(2 * i + 1) * stride];
            const Real cosine = c[i * cos_column], sine = direction * s[i * sin_column];
            to[2 * i] = even * cosine - odd * sine;
            to[2 * i + 1] = even * sine + odd * cosine;
        }
    }
};

template <typename Real>
inline void zero(Real* at, int64_t count) {
    if (count > 0) std::memset(at, 0, count * sizeof(Real));  // else `at` may be null
}

// The queries of a group in one head, and the rows of the keys that its list names.
struct Unit {
    int64_t batch, head, group;
    const int64_t* rows;    // without those that are no keys; NULL: 0, 1, 2 ...
    const int64_t* before;  // how many of the first n entries of the list are keys
    int64_t keys;           // as many as any of its queries attends to

    int64_t row(int64_t j) const { return rows == nullptr ? j : rows[j]; }
    int64_t among(int64_t entries) const { return rows == nullptr ? entries : before[entries]; }
};

// Consecutive queries of a unit that attend to equally many keys.
struct Tile {
    int64_t query, rows, keys;
};

// How the queries are cut into units and tiles, and the work into slots.
struct Plan {
    const icseg_attention& call;
    const Runs& runs;
    int64_t units, per_unit, tiles, work;
    int64_t* lists;

    Plan(const icseg_attention& call, const Runs& runs, int64_t products)
        : call(call), runs(runs), units(call.batch * call.heads * call.groups), per_unit(call.queries / call.groups),
          tiles(0), lists(static_cast<int64_t*>(call.workspace)) {
        if (runs.count == 0 || call.groups > 1) {
            tiles = (per_unit + kTileRows - 1) / kTileRows;
        } else {
            for (int64_t i = 0; i < runs.count; ++i) tiles += (runs.pairs[2 * i] + kTileRows - 1) / kTileRows;
        }
        // Bytes that take as long as these operations.
        const double operations = static_cast<double>(products) * (call.dim + call.value_dim) * call.queries *
                                  call.listed * call.batch * call.heads / 10;
        work = operations < 1e15 ? static_cast<int64_t>(operations) : int64_t{1} << 50;
    }

    // Past the lists.
    template <typename Real>
    Real* elements() const {
        const int64_t count = call.batch * call.groups * (2 * call.listed + 1);
        return reinterpret_cast<Real*>(lists + (call.index_bytes == 0 ? 0 : padded(count)));
    }

    // body(i, slot) for 0 <= i < count, each slot its share.
    template <typename Body>
    void share(int64_t count, const Body& body) const {
        const int64_t slots = smaller(call.slots, count);
        parallel_for(slots, work, [&](int64_t slot) {
            const int64_t each = count / slots, more = count % slots;
            const int64_t first = slot * each + smaller(slot, more);
            for (int64_t i = first; i < first + each + (slot < more); ++i) body(i, slot);
        });
    }

    // Sorts out which entries of the lists are keys.
    void read_lists() const {
        if (call.index_bytes == 0) return;
        share(call.batch * call.groups, [&](int64_t n, int64_t) {
            const int64_t from = n / call.groups * call.stride_index_batch + n % call.groups * call.stride_index_group;
            int64_t *rows = lists + n * (2 * call.listed + 1), *before = rows + call.listed, count = 0;
            for (int64_t j = 0; j < call.listed; ++j) {
                const int64_t at = from + j * call.stride_index_entry;
                const int64_t row = call.index_bytes == 4 ? static_cast<const int32_t*>(call.index)[at]
                                                          : static_cast<const int64_t*>(call.index)[at];
                before[j] = count;
                rows[count] = row;
                count += row >= 0 && row < call.keys;
            }
            before[call.listed] = count;
        });
    }

    Unit unit(int64_t n) const {
        Unit u{n / call.groups / call.heads, n / call.groups % call.heads, n % call.groups, nullptr, nullptr, 0};
        if (call.index_bytes != 0) {
            u.rows = lists + (u.batch * call.groups + u.group) * (2 * call.listed + 1);
            u.before = u.rows + call.listed;
        }
        int64_t entries = runs.count ? 0 : call.listed;
        if (call.groups > 1) {
            entries = entries_of(u.group * per_unit);
        } else {
            for (int64_t i = 0; i < runs.count; ++i) entries = larger(entries, runs.pairs[2 * i + 1]);
        }
        u.keys = u.among(entries);
        return u;
    }

    Tile tile(const Unit& u, int64_t n) const {
        if (runs.count == 0 || call.groups > 1) {
            return {n * kTileRows, smaller(kTileRows, per_unit - n * kTileRows), u.keys};
        }
        int64_t start = 0;
        for (const int64_t* run = runs.pairs;; run += 2) {
            const int64_t in_run = (run[0] + kTileRows - 1) / kTileRows;
            if (n < in_run) return {start + n * kTileRows, smaller(kTileRows, run[0] - n * kTileRows), u.among(run[1])};
            n -= in_run, start += run[0];
        }
    }

  private:
    int64_t entries_of(int64_t query) const {
        if (runs.count == 0) return call.listed;
        const int64_t* run = runs.pairs;
        for (; query >= run[0]; run += 2) query -= run[0];
        return run[1];
    }
};

// --- forward ----------------------------------------------------------------------------------------

template <typename Real>
struct Forward {
    const Plan& plan;
    const icseg_attention& call;
    ForwardSpace space;
    Real *out, *lse;

    Forward(const Plan& plan, Real* out, Real* lse)
        : plan(plan), call(plan.call), space(call.dim, call.value_dim, call.listed), out(out), lse(lse) {}

    // Values lie in rows of whole vectors, which can be read where they are.
    bool values_in_place() const {
        return call.index_bytes == 0 && call.v.stride_column == 1 && call.value_dim % kLanes<Real> == 0;
    }

    // Panel p of the keys, and their values.
    void pack(const Unit& u, int64_t p, Real* place, Real* scratch) const {
        const Rows<Real> keys(call.k, call.k_cos, call.k_sin, u.batch, u.head, call.dim);
        const int64_t first = p * kPanel<Real>, count = smaller(kPanel<Real>, u.keys - first);
        const int64_t wide = padded(call.dim);
        const Real* rows[kPanel<Real>];
        for (int64_t j = 0; j < count; ++j) rows[j] = keys.at(u.row(first + j), scratch + space.rows + j * wide);
        transpose<Real>(rows, count, call.dim, 1, place + space.keys + first * call.dim, kPanel<Real>);
        if (values_in_place()) return;
        const Rows<Real> values(call.v, u.batch, u.head, call.value_dim);
        const int64_t value_wide = padded(call.value_dim);
        Real* to = place + space.values + first * value_wide;
        for (int64_t j = 0; j < count; ++j, to += value_wide) {
            values.copy(u.row(first + j), to);
            zero(to + call.value_dim, value_wide - call.value_dim);
        }
    }

    void attend(const Unit& u, const Tile& tile, const Real* place, Real* scratch) const {
        const int64_t query = u.group * plan.per_unit + tile.query;
        const int64_t stride = call.heads * call.value_dim;
        Real* to = out + (u.batch * call.queries + query) * stride + u.head * call.value_dim;
        Real* to_lse = lse + (u.batch * call.heads + u.head) * call.queries + query;
        if (tile.keys == 0) {
            for (int64_t r = 0; r < tile.rows; ++r, to += stride) {
                zero(to, call.value_dim);
                to_lse[r] = call.sink ? 0 : -static_cast<Real>(INFINITY);
            }
            return;
        }
        const Rows<Real> queries(call.q, call.q_cos, call.q_sin, u.batch, u.head, call.dim);
        const int64_t wide = padded(call.dim);
        const Real* rows[kTileRows];
        for (int64_t r = 0; r < tile.rows; ++r) rows[r] = queries.at(query + r, scratch + space.rows + r * wide);
        Real *q = scratch + space.tile, *scores = scratch + space.scores;
        transpose<Real>(rows, tile.rows, call.dim, call.scale, q, kTileStride<Real>);

        const Real* values = place + space.values;
        int64_t value_stride = padded(call.value_dim);
        if (values_in_place()) {
            const Rows<Real> in_place(call.v, u.batch, u.head, call.value_dim);
            values = in_place.data, value_stride = in_place.row;
        }
        Real most[kTileRows], total[kTileRows], factor[kTileRows];
        for (int64_t r = 0; r < kTileRows; ++r) {
            most[r] = call.sink ? 0 : -static_cast<Real>(INFINITY);
            total[r] = call.sink ? 1 : 0;
        }
        const int64_t blocks = (tile.keys + kMostKeys<Real> - 1) / kMostKeys<Real>;
        const int64_t fewest = (tile.keys + blocks - 1) / blocks;
        const int64_t each = (fewest + kPanel<Real> - 1) / kPanel<Real> * kPanel<Real>;
        for (int64_t first = 0; first < tile.keys; first += each) {
            const int64_t count = smaller(each, tile.keys - first);
            const bool last = first + count == tile.keys;
            multiply_keys(q, place + space.keys + first * call.dim, tile.rows, count, scores);
            for (int64_t r = 0; r < tile.rows; ++r) {
                factor[r] = exponentials<Real>(scores + r * kScoresRow<Real>, count, most[r], total[r]);
            }
            Real finish[kTileRows];
            for (int64_t r = 0; r < tile.rows; ++r) finish[r] = !last ? 1 : total[r] == 0 ? 0 : 1 / total[r];
            add_values(scores, values + first * value_stride, value_stride, tile.rows, count,
                       first == 0 ? nullptr : factor, finish, to, stride);
        }
        for (int64_t r = 0; r < tile.rows; ++r) {
            const bool nothing = total[r] == 0 || most[r] == static_cast<Real>(INFINITY);
            to_lse[r] = nothing ? most[r] : most[r] + log_of(total[r]);
        }
    }

  private:
    // scores[r * kScoresRow + j] = q[r] . key j
    void multiply_keys(const Real* q, const Real* panels, int64_t rows, int64_t count, Real* scores) const {
        for_rows(rows, [&](auto row_count) ICSEG_INLINE {
            constexpr int64_t Rows = decltype(row_count)::value;
            for_columns<Real>(count, [&](int64_t j, auto vectors) ICSEG_INLINE {
                constexpr int64_t Vectors = decltype(vectors)::value;
                Vector<Real> sum[Rows][Vectors];
                ::multiply<1, kTileStride<Real>>(q, panels + j * call.dim, kPanel<Real>, call.dim, sum);
                for (int64_t r = 0; r < Rows; ++r) {
                    for (int64_t v = 0; v < Vectors; ++v) {
                        store(scores + r * kScoresRow<Real> + j + v * kLanes<Real>, sum[r][v]);
                    }
                }
            });
        });
    }

    // out[r] = (out[r] * factor[r] + sum of p[r][j] * value j) * finish[r]; no factor: out is not read.
    void add_values(const Real* p, const Real* values, int64_t value_stride, int64_t rows, int64_t count,
                    const Real* factor, const Real* finish, Real* to, int64_t stride) const {
        for_rows(rows, [&](auto row_count) ICSEG_INLINE {
            constexpr int64_t Rows = decltype(row_count)::value;
            for_columns<Real>(call.value_dim, [&](int64_t c, auto vectors) ICSEG_INLINE {
                constexpr int64_t Vectors = decltype(vectors)::value;
                Vector<Real> sum[Rows][Vectors];
                ::multiply<kScoresRow<Real>, 1>(p, values + c, value_stride, count, sum);
                for (int64_t r = 0; r < Rows; ++r) {
                    if (r == rows) return;
                    for (int64_t v = 0; v < Vectors; ++v) {
                        const int64_t column = c + v * kLanes<Real>, width = call.value_dim - column;
                        Real* at = to + r * stride + column;
                        if (width >= kLanes<Real>) {
                            const Vector<Real> all = factor ? fma(load(at), broadcast(factor[r]), sum[r][v]) : sum[r][v];
                            store(at, all * finish[r]);
                        } else {
                            const Vector<Real> all =
                                factor ? fma(load_first(at, width), broadcast(factor[r]), sum[r][v]) : sum[r][v];
                            store_first(at, all * finish[r], width);
                        }
                    }
                }
            });
        });
    }
};

}  // namespace

template <typename Real>
void attention(const icseg_attention& call, const Runs& runs, Real* out, Real* lse) {
    const Plan plan(call, runs, 2);
    const Forward<Real> forward(plan, out, lse);
    const int64_t panels = (call.listed + kPanel<Real> - 1) / kPanel<Real>;
    const int64_t unit_size = forward.space.unit.end, slot_size = forward.space.slot.end;
    Real* slots = plan.elements<Real>();
    Real* places = slots + call.slots * slot_size;
    plan.read_lists();
    if (whole_units(plan.units, call.slots)) {
        plan.share(plan.units, [&](int64_t n, int64_t slot) {
            const Unit u = plan.unit(n);
            Real *place = places + slot * unit_size, *scratch = slots + slot * slot_size;
            for (int64_t p = 0; p * kPanel<Real> < u.keys; ++p) forward.pack(u, p, place, scratch);
            for (int64_t t = 0; t < plan.tiles; ++t) forward.attend(u, plan.tile(u, t), place, scratch);
        });
        return;
    }
    plan.share(plan.units * panels, [&](int64_t n, int64_t slot) {
        const Unit u = plan.unit(n / panels);
        if (n % panels * kPanel<Real> >= u.keys) return;
        forward.pack(u, n % panels, places + n / panels * unit_size, slots + slot * slot_size);
    });
    plan.share(plan.units * plan.tiles, [&](int64_t n, int64_t slot) {
        const Unit u = plan.unit(n / plan.tiles);
        forward.attend(u, plan.tile(u, n % plan.tiles), places + n / plan.tiles * unit_size, slots + slot * slot_size);
    });
}

// --- backward ---------------------------------------------------------------------------------------

namespace {

template <typename Real>
struct Backward {
    const Plan& plan;
    const icseg_attention& call;
    const AttentionGradients<Real>& grad;
    BackwardSpace space;
    int64_t wide, value_wide;
    Real* listed;  // gradients of listed keys, then of listed values, unit by unit

    Backward(const Plan& plan, const AttentionGradients<Real>& grad, Real* listed)
        : plan(plan), call(plan.call), grad(grad),
          space(call.dim, call.value_dim, plan.per_unit, call.listed, plan.runs.count, plan.units),
          wide(padded(call.dim)), value_wide(padded(call.value_dim)), listed(listed) {}

    // A tile's queries and output gradients as rows and as columns, and the constants of its rows.
    void prepare(const Unit& u, int64_t t, Real* place) const {
        const Tile tile = plan.tile(u, t);
        const int64_t query = u.group * plan.per_unit + tile.query;
        const Rows<Real> queries(call.q, call.q_cos, call.q_sin, u.batch, u.head, call.dim);
        const Rows<Real> out(grad.out, u.batch, u.head, call.value_dim);
        const Rows<Real> grad_out(grad.grad_out, u.batch, u.head, call.value_dim);
        const int64_t at_lse = (u.batch * call.heads + u.head) * call.queries + query;
        const Real scale = call.scale;
        const Real *q_rows[kTileRows], *grad_rows[kTileRows];
        for (int64_t r = 0; r < tile.rows; ++r) {
            Real* q = place + space.q_rows + (tile.query + r) * wide;
            queries.copy(query + r, q);
            for (int64_t i = 0; i < call.dim; ++i) q[i] *= scale;
            zero(q + call.dim, wide - call.dim);
            Real* g = place + space.grad_rows + (tile.query + r) * value_wide;
            grad_out.copy(query + r, g);
            zero(g + call.value_dim, value_wide - call.value_dim);
            const Real* o = out.data + (query + r) * out.row;
            Real delta = 0;
            for (int64_t i = 0; i < call.value_dim; ++i) delta += g[i] * o[i * out.column];
            if (grad.grad_lse != nullptr) delta -= grad.grad_lse[at_lse + r];
            const Real lse = grad.lse[at_lse + r];
            place[space.delta + tile.query + r] = delta;
            place[space.lse + tile.query + r] = lse == -static_cast<Real>(INFINITY) ? -lse : lse;  // all scores -inf
            q_rows[r] = q, grad_rows[r] = g;
        }
        transpose<Real>(q_rows, tile.rows, call.dim, 1, place + space.q_tiles + t * kTileStride<Real> * call.dim,
                        kTileStride<Real>);
        transpose<Real>(grad_rows, tile.rows, call.value_dim, 1,
                        place + space.grad_tiles + t * kTileStride<Real> * call.value_dim, kTileStride<Real>);
    }

    // A share of the unit's keys: their gradients, and what they add to those of the queries.
    void part(const Unit& u, int64_t n, Real* place, Real* scratch) const {
        Real* grad_q = place + space.grad_q + n * plan.per_unit * wide;
        zero(grad_q, plan.per_unit * wide);
        const int64_t chunks = (u.keys + kChunk - 1) / kChunk;
        for (int64_t c = chunks * n / space.parts; c < chunks * (n + 1) / space.parts; ++c) {
            const int64_t first = c * kChunk, count = smaller(kChunk, u.keys - first);
            pack(u, first, count, scratch);
            for (int64_t t = 0; t < plan.tiles;) {
                const int64_t first_tile = t;
                Tile block = plan.tile(u, t++);
                bool full = block.rows == kTileRows;
                while (t < plan.tiles && full && block.rows + kTileRows <= kBlock) {
                    const Tile next = plan.tile(u, t);
                    if (next.keys != block.keys) break;
                    block.rows += next.rows, full = next.rows == kTileRows, ++t;
                }
                const int64_t active = smaller(block.keys - first, count);
                if (active > 0) add_block(block, first_tile, active, place, grad_q, scratch);
            }
            finish_keys(u, first, count, scratch);
        }
    }

    // Gradients of a tile's queries, from all parts.
    void finish_queries(const Unit& u, int64_t t, Real* place) const {
        const Tile tile = plan.tile(u, t);
        const int64_t query = u.group * plan.per_unit + tile.query;
        const Rows<Real> queries(call.q, call.q_cos, call.q_sin, u.batch, u.head, call.dim);
        Real* to = grad.q + ((u.batch * call.heads + u.head) * call.queries + query) * call.dim;
        const Real scale = call.scale;
        for (int64_t r = 0; r < tile.rows; ++r, to += call.dim) {
            Real* sum = place + space.grad_q + (tile.query + r) * wide;
            for (int64_t n = 1; n < space.parts; ++n) {
                const Real* other = sum + n * plan.per_unit * wide;
                for (int64_t i = 0; i < call.dim; ++i) sum[i] += other[i];
            }
            for (int64_t i = 0; i < call.dim; ++i) sum[i] *= scale;
            queries.turn_back(sum, query + r, to);
        }
    }

    // Gradients of all keys (values) of a head: those of the listed ones added up in the order of the lists.
    void add_listed(int64_t n, bool of_values) const {
        const int64_t width = of_values ? call.value_dim : call.dim;
        Real* to = (of_values ? grad.v : grad.k) + n * call.keys * width;
        if (call.index_bytes == 0) {
            const int64_t keys = plan.unit(n).keys;
            zero(to + keys * width, (call.keys - keys) * width);
            return;
        }
        zero(to, call.keys * width);
        for (int64_t g = 0; g < call.groups; ++g) {
            const Unit u = plan.unit(n * call.groups + g);
            const Real* from = listed_of(u, of_values);
            for (int64_t j = 0; j < u.keys; ++j, from += width) {
                Real* row = to + u.rows[j] * width;
                for (int64_t i = 0; i < width; ++i) row[i] += from[i];
            }
        }
    }

  private:
    Real* listed_of(const Unit& u, bool of_values) const {
        const int64_t n = (u.batch * call.heads + u.head) * call.groups + u.group;
        return of_values ? listed + (plan.units * call.dim + n * call.value_dim) * call.listed
                         : listed + n * call.listed * call.dim;
    }

    void pack(const Unit& u, int64_t first, int64_t count, Real* scratch) const {
        const Rows<Real> keys(call.k, call.k_cos, call.k_sin, u.batch, u.head, call.dim);
        const Rows<Real> values(call.v, u.batch, u.head, call.value_dim);
        const Real *k_rows[kChunk], *v_rows[kChunk];
        for (int64_t j = 0; j < count; ++j) {
            Real* k = scratch + space.k_rows + j * wide;
            keys.copy(u.row(first + j), k);
            zero(k + call.dim, wide - call.dim);
            k_rows[j] = k;
            v_rows[j] = values.at(u.row(first + j), scratch + space.v_rows + j * value_wide);
        }
        for (int64_t j = 0; j < count; j += kPanel<Real>) {
            const int64_t width = smaller(kPanel<Real>, count - j);
            transpose<Real>(k_rows + j, width, call.dim, 1, scratch + space.k_panels + j * call.dim, kPanel<Real>);
            transpose<Real>(v_rows + j, width, call.value_dim, 1, scratch + space.v_panels + j * call.value_dim,
                            kPanel<Real>);
        }
        zero(scratch + space.grad_k, count * wide);
        zero(scratch + space.grad_v, count * value_wide);
    }

    // Queries of a block against the first `active` keys of the chunk.
    void add_block(const Tile& block, int64_t first_tile, int64_t active, const Real* place, Real* grad_q,
                   Real* scratch) const {
        Real *p = scratch + space.p, *grad_s = scratch + space.grad_s;
        for (int64_t i = 0; i < block.rows; i += kTileRows) {
            const int64_t rows = smaller(kTileRows, block.rows - i), t = first_tile + i / kTileRows;
            multiply(place + space.q_tiles + t * kTileStride<Real> * call.dim, scratch + space.k_panels, rows, active,
                     call.dim, p + i * kChunk);
            multiply(place + space.grad_tiles + t * kTileStride<Real> * call.value_dim, scratch + space.v_panels, rows,
                     active, call.value_dim, grad_s + i * kChunk);
            for (int64_t r = i; r < i + rows; ++r) {
                const Vector<Real> lse = broadcast(place[space.lse + block.query + r]);
                const Vector<Real> delta = broadcast(place[space.delta + block.query + r]);
                for (int64_t j = r * kChunk; j < r * kChunk + active; j += kLanes<Real>) {
                    const Vector<Real> e = exponential<Real>(load(p + j) - lse);
                    store(p + j, e);
                    store(grad_s + j, e * (load(grad_s + j) - delta));
                }
            }
            add<kChunk, 1>(grad_s + i * kChunk, scratch + space.k_rows, wide, rows, active,
                           grad_q + (block.query + i) * wide);
        }
        for (int64_t j = 0; j < active; j += kTileRows) {
            const int64_t rows = smaller(kTileRows, active - j);
            add<1, kChunk>(p + j, place + space.grad_rows + block.query * value_wide, value_wide, rows, block.rows,
                           scratch + space.grad_v + j * value_wide);
            add<1, kChunk>(grad_s + j, place + space.q_rows + block.query * wide, wide, rows, block.rows,
                           scratch + space.grad_k + j * wide);
        }
    }

    // to[r * kChunk + j] = column r of the tile . column j of the panels
    static void multiply(const Real* tile, const Real* panels, int64_t rows, int64_t count, int64_t depth, Real* to) {
        for_rows(rows, [&](auto row_count) ICSEG_INLINE {
            constexpr int64_t Rows = decltype(row_count)::value;
            for_columns<Real>(count, [&](int64_t j, auto vectors) ICSEG_INLINE {
                constexpr int64_t Vectors = decltype(vectors)::value;
                Vector<Real> sum[Rows][Vectors];
                ::multiply<1, kTileStride<Real>>(tile, panels + j * depth, kPanel<Real>, depth, sum);
                for (int64_t r = 0; r < Rows; ++r) {
                    for (int64_t v = 0; v < Vectors; ++v) store(to + r * kChunk + j + v * kLanes<Real>, sum[r][v]);
                }
            });
        });
    }

    // to[r] += sum of left[r][k] * row k of `right`, whole vectors of it; both have rows of `width`.
    template <int64_t RowStep, int64_t DepthStep>
    static void add(const Real* left, const Real* right, int64_t width, int64_t rows, int64_t depth, Real* to) {
        for_rows(rows, [&](auto row_count) ICSEG_INLINE {
            constexpr int64_t Rows = decltype(row_count)::value;
            for_columns<Real>(width, [&](int64_t c, auto vectors) ICSEG_INLINE {
                constexpr int64_t Vectors = decltype(vectors)::value;
                Vector<Real> sum[Rows][Vectors];
                ::multiply<RowStep, DepthStep>(left, right + c, width, depth, sum);
                for (int64_t r = 0; r < Rows; ++r) {
                    if (r == rows) return;
                    for (int64_t v = 0; v < Vectors; ++v) {
                        Real* at = to + r * width + c + v * kLanes<Real>;
                        store(at, load(at) + sum[r][v]);
                    }
                }
            });
        });
    }

    // Gradients of a chunk's keys and values go where they belong, or to wait for those of the same rows.
    void finish_keys(const Unit& u, int64_t first, int64_t count, Real* scratch) const {
        const Rows<Real> keys(call.k, call.k_cos, call.k_sin, u.batch, u.head, call.dim);
        const int64_t rows = (u.batch * call.heads + u.head) * call.keys;
        Real* to_k = call.index_bytes ? listed_of(u, false) : grad.k + rows * call.dim;
        Real* to_v = call.index_bytes ? listed_of(u, true) : grad.v + rows * call.value_dim;
        for (int64_t j = 0; j < count; ++j) {
            keys.turn_back(scratch + space.grad_k + j * wide, u.row(first + j), to_k + (first + j) * call.dim);
            if (call.value_dim == 0) continue;  // `to_v` may be null
            std::memcpy(to_v + (first + j) * call.value_dim, scratch + space.grad_v + j * value_wide,
                        call.value_dim * sizeof(Real));
        }
    }
};

}  // namespace

template <typename Real>
void attention_backward(const icseg_attention& call, const Runs& runs, const AttentionGradients<Real>& grad) {
    const Plan plan(call, runs, 5);
    Real* listed = plan.elements<Real>();
    const int64_t listed_size = call.index_bytes ? padded(plan.units * call.listed * (call.dim + call.value_dim)) : 0;
    const Backward<Real> backward(plan, grad, listed);
    const int64_t unit_size = backward.space.unit.end, slot_size = backward.space.slot.end;
    Real* slots = listed + listed_size;
    Real* places = slots + call.slots * slot_size;
    plan.read_lists();
    if (whole_units(plan.units, call.slots)) {
        plan.share(plan.units, [&](int64_t n, int64_t slot) {
            const Unit u = plan.unit(n);
            Real* place = places + slot * unit_size;
            for (int64_t t = 0; t < plan.tiles; ++t) backward.prepare(u, t, place);
            for (int64_t p = 0; p < backward.space.parts; ++p) backward.part(u, p, place, slots + slot * slot_size);
            for (int64_t t = 0; t < plan.tiles; ++t) backward.finish_queries(u, t, place);
        });
    } else {
        const auto each_tile = [&](auto body) {
            plan.share(plan.units * plan.tiles, [&](int64_t n, int64_t) {
                body(plan.unit(n / plan.tiles), n % plan.tiles, places + n / plan.tiles * unit_size);
            });
        };
        each_tile([&](const Unit& u, int64_t t, Real* place) { backward.prepare(u, t, place); });
        const int64_t parts = backward.space.parts;
        plan.share(plan.units * parts, [&](int64_t n, int64_t slot) {
            backward.part(plan.unit(n / parts), n % parts, places + n / parts * unit_size, slots + slot * slot_size);
        });
        each_tile([&](const Unit& u, int64_t t, Real* place) { backward.finish_queries(u, t, place); });
    }
    plan.share(call.batch * call.heads * 2, [&](int64_t n, int64_t) { backward.add_listed(n / 2, n % 2); });
}

#define ICSEG_ATTENTION(Real)                                                            \
    template void attention<Real>(const icseg_attention&, const Runs&, Real*, Real*); \
    template void attention_backward<Real>(const icseg_attention&, const Runs&, const AttentionGradients<Real>&);
ICSEG_ATTENTION(float)
ICSEG_ATTENTION(double)

}  // namespace ICSEG_ISA
}  // namespace icseg
