// The kernel of transformer_block; sizes are checked, and no product or sum of them overflows.
#pragma once

#include <cstdint>

#include "../../icseg.h"
#include "../isa.h"

namespace icseg {

constexpr int64_t kRowStep = 16;      // rows of scratch memory are filled up to whole cache lines
constexpr int64_t kWidestPanel = 32;  // outputs, or keys, at a time: two vectors of the widest instruction set
constexpr int64_t kMostTokens = 64;   // at a time
constexpr int64_t kMostKeys = 512;    // at a time: whole panels

struct TransformerBlock {
    const icseg_block& call;
    const icseg_block_memory* memory;
    int64_t pieces;
    float *out, *own;
    int64_t keys;  // all that there are, seen or not
    int64_t tokens = 0, slots = 0;
    int64_t at_once = 0;                               // tokens at a time, at most
    int64_t pitch = 0, hidden_pitch = 0, scores_pitch = 0;  // from one row of scratch memory to the next
    // Where the pieces of a slot's scratch memory begin, and where the last one ends.
    int64_t rows = 0, hidden = 0, panel = 0, scores = 0, all_keys = 0, seen_keys = 0, scratch = 0;
    float* workspace = nullptr;  // aligned to a cache line: queries [tokens, pitch], then the slots' scratch memory
    int64_t work = 0;            // as bytes touched, for parallel_for
};

ICSEG_KERNEL(void transformer_block(const TransformerBlock& block))

}  // namespace icseg
