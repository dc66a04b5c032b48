// transformer_block: attention to a memory and to each other, and an MLP, of few tokens.
#include "kernels/transformer_block.h"

#include "checks.h"

namespace icseg {
namespace {

constexpr int64_t kAlign = 64;
constexpr int64_t kMostChannels = 512, kMostHidden = 2048;

bool within(int64_t value, int64_t least, int64_t most) { return least <= value && value <= most; }

int64_t padded(int64_t elements) { return (elements + kRowStep - 1) / kRowStep * kRowStep; }

// Where everything lies in the workspace, and its bytes in *bytes; an error code if sizes are impossible. Past it, no
// product or sum of them overflows.
int plan(TransformerBlock& block, int64_t* bytes) {
    const icseg_block& call = block.call;
    if (!within(call.dim, 1, kMostChannels) || !within(call.heads, 1, call.dim) || call.dim % call.heads != 0 ||
        !within(call.hidden, 1, kMostHidden)) {
        return ICSEG_BLOCK;
    }
    if (any_negative({call.batch, call.count, call.listed, block.keys})) return ICSEG_NEGATIVE_SIZE;
    constexpr int64_t most_slots = int64_t{1} << 20;
    if (call.slots < 1 || call.slots > most_slots) return ICSEG_TOO_LARGE;
    constexpr int64_t widest = 4 * kMostHidden;
    int64_t values;
    if (!multiply({call.batch, call.count, widest, sizeof(float)}, &values) ||
        !multiply({block.keys, widest, call.slots, sizeof(float)}, &values) ||
        !multiply({call.listed, widest, call.slots, sizeof(float)}, &values)) {
        return ICSEG_TOO_LARGE;
    }
    block.tokens = call.batch * call.count;
    // A slot makes panels of all weights, which costs as much as multiplying about so many tokens with them.
    constexpr int64_t least_tokens = 8;
    block.slots = std::max<int64_t>(std::min(call.slots, block.tokens / least_tokens), 1);
    block.at_once = std::min((block.tokens + block.slots - 1) / block.slots, kMostTokens);
    block.pitch = padded(call.dim);
    block.hidden_pitch = padded(call.hidden);
    // An odd number of cache lines: of an even one, a tile's rows would share few sets of the cache.
    block.scores_pitch = padded(std::min(call.listed, kMostKeys)) / kRowStep / 2 * 2 * kRowStep + kRowStep;
    int64_t end = 0;
    const auto take = [&](int64_t elements) {
        const int64_t at = end;
        end += padded(elements);
        return at;
    };
    constexpr int64_t pointer = sizeof(void*) / sizeof(float);
    block.rows = take(block.at_once * block.pitch);
    block.hidden = take(block.at_once * block.hidden_pitch);
    block.panel = take((std::max(call.dim, call.hidden) + 1) * kWidestPanel);
    block.scores = take(block.at_once * block.scores_pitch);
    block.all_keys = take(block.keys * pointer);
    block.seen_keys = take(call.listed * pointer);
    block.scratch = end;
    int64_t queries, scratch;
    if (!multiply({block.tokens, block.pitch, sizeof(float)}, &queries) ||
        !multiply({block.slots, block.scratch, sizeof(float)}, &scratch) ||
        __builtin_add_overflow(queries, scratch, bytes) || __builtin_add_overflow(*bytes, kAlign, bytes)) {
        return ICSEG_TOO_LARGE;
    }
    // A core multiplies and adds four times while it copies a byte.
    const double of_token = 4.0 * call.dim * call.dim + 2.0 * call.dim * call.hidden + 2.0 * call.dim * call.listed;
    block.work = static_cast<int64_t>(std::min(of_token * static_cast<double>(block.tokens) / 4, 1e15));
    return ICSEG_OK;
}

}  // namespace
}  // namespace icseg

int icseg_transformer_block_workspace(int64_t batch, int64_t count, int64_t dim, int64_t heads, int64_t hidden,
                                      int64_t keys, int64_t listed, int64_t slots, int64_t* bytes) {
    icseg_block call{};
    call.batch = batch, call.count = count, call.listed = listed, call.slots = slots;
    call.dim = dim, call.heads = heads, call.hidden = hidden;
    icseg::TransformerBlock block{call, nullptr, 0, nullptr, nullptr, keys};
    return icseg::plan(block, bytes);
}

int icseg_transformer_block_f32(const icseg_block* call, const icseg_block_memory* memory, int64_t pieces, float* out,
                                float* own) {
    using namespace icseg;
    if (pieces < 0 || call->count < 0) return ICSEG_NEGATIVE_SIZE;
    if (call->index_bytes != 0 && call->index_bytes != 4 && call->index_bytes != 8) return ICSEG_ELEMENT_BYTES;
    TransformerBlock block{*call, memory, pieces, out, own, call->count};
    for (int64_t i = 0; i < pieces; ++i) {
        if (memory[i].tokens < 0) return ICSEG_NEGATIVE_SIZE;
        if (__builtin_add_overflow(block.keys, memory[i].tokens, &block.keys)) return ICSEG_TOO_LARGE;
    }
    int64_t bytes;
    if (const int code = plan(block, &bytes)) return code;
    if (call->index_bytes == 0 && call->listed != block.keys) return ICSEG_RUNS;
    if (call->workspace_bytes < bytes) return ICSEG_WORKSPACE;
    if (block.tokens == 0) return ICSEG_OK;
    const uintptr_t workspace = reinterpret_cast<uintptr_t>(call->workspace);
    block.workspace = reinterpret_cast<float*>((workspace + kAlign - 1) / kAlign * kAlign);
    ICSEG_CHOSEN(transformer_block)(block);
    return ICSEG_OK;
}
