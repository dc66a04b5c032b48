// The kernels of selected_attention; sizes are checked, and no product or sum of them overflows.
#pragma once

#include <cstdint>

#include "../../icseg.h"
#include "../isa.h"

namespace icseg {

// (queries, keys) of consecutive queries; none: all queries, whole lists.
struct Runs {
    const int64_t* pairs;
    int64_t count;
};

template <typename Real>
struct AttentionGradients {
    icseg_heads out, grad_out;
    const Real *lse, *grad_lse;
    Real *q, *k, *v;
};

ICSEG_KERNEL(template <typename Real>
             void attention(const icseg_attention& call, const Runs& runs, Real* out, Real* lse))
ICSEG_KERNEL(template <typename Real>
             void attention_backward(const icseg_attention& call, const Runs& runs, const AttentionGradients<Real>& grad))

// Where things lie in the workspace. A unit is a group's queries in one head, with their keys; a slot is a share of the
// work. Sums of sizes rounded up for the widest vectors, so that all instruction sets need the same bytes.
namespace {

constexpr int64_t kPadding = 16;     // elements; a multiple of every vector
constexpr int64_t kMostPanel = 32;   // keys in a panel
constexpr int64_t kScores = 12 * 31 * 16;  // of a tile of queries at a time: 24 KB of floats
constexpr int64_t kChunk = 96;       // keys whose gradients are summed at a time
constexpr int64_t kBlock = 48;       // queries at a time then

inline int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

struct Space {
    int64_t end = 0;
    int64_t take(int64_t elements) {
        const int64_t at = end;
        end += padded(elements);
        return at;
    }
};

// Whether a slot takes whole units, with a place for one unit each; else every unit has its place and all share in it.
inline bool whole_units(int64_t units, int64_t slots) { return units % slots == 0 || units / 4 >= slots; }

// Elements of every piece.
struct ForwardSpace {
    Space unit, slot;
    int64_t keys, values;
    int64_t rows, tile, scores;

    ForwardSpace(int64_t dim, int64_t value_dim, int64_t listed)
        : keys(unit.take((listed + kMostPanel) * dim)),
          values(unit.take(listed * padded(value_dim))),
          rows(slot.take(kMostPanel * padded(dim))),
          tile(slot.take(kPadding * dim)),
          scores(slot.take(kScores)) {}
};

struct BackwardSpace {
    Space unit, slot;
    int64_t parts;  // of the keys: each sums gradients of its own for the queries
    int64_t q_rows, q_tiles, grad_rows, grad_tiles, lse, delta, grad_q;
    int64_t k_rows, k_panels, v_rows, v_panels, grad_k, grad_v, p, grad_s;

    BackwardSpace(int64_t dim, int64_t value_dim, int64_t queries, int64_t listed, int64_t runs, int64_t units)
        : parts(units >= 16 || listed <= kChunk ? 1 : listed <= 2 * kChunk ? 2 : 4) {
        const int64_t tiled = queries + queries / 3 + kPadding * (runs + 1);  // a tile's columns are padded
        const int64_t wide = padded(dim), value_wide = padded(value_dim);
        q_rows = unit.take(queries * wide);
        q_tiles = unit.take(tiled * dim);
        grad_rows = unit.take(queries * value_wide);
        grad_tiles = unit.take(tiled * value_dim);
        lse = unit.take(queries);
        delta = unit.take(queries);
        grad_q = unit.take(parts * queries * wide);
        k_rows = slot.take(kChunk * wide);
        k_panels = slot.take(kChunk * dim);
        v_rows = slot.take(kChunk * value_wide);
        v_panels = slot.take(kChunk * value_dim);
        grad_k = slot.take(kChunk * wide);
        grad_v = slot.take(kChunk * value_wide);
        p = slot.take(kBlock * kChunk);
        grad_s = slot.take(kBlock * kChunk);
    }
};

}  // namespace
}  // namespace icseg
