"""The kernel of attend_patches: from the hidden units of a level's tokens to what its transformer makes of them.

A program takes BLOCK_TOKENS tokens of a sample through all blocks. A block's keys are those of all its tokens, so the
programs of a sample wait for each other once a block: each counts itself into a word of the sample when its keys are
written, attends to the keys of the memory and of earlier tokens, and waits for the others before it attends to theirs.

A word starts as whatever memory held, for nothing clears it before the launch. The first program of a sample sets it to
the number of the launch, above COUNT_BITS bits of a count; a program has counted itself in once it found that number
there; the last that leaves clears it, so that the number is not there when a CUDA graph launches the kernel again.

The parts of the work are functions that are called, not inlined: what the compiler computes of one in advance, out of
the loop over blocks, would take more registers than there are.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from icseg_kernels.arithmetic_triton_kernels import divide, gelu
from icseg_kernels.compilation import Compilation
from icseg_kernels.transformer_block.triton_kernels import _normalised, _product, _statistics

COUNT_BITS = tl.constexpr(16)


@triton.jit
def _of_block(i, a, b, c, d):  # type: ignore[no-untyped-def]
    """The i-th, of scalars."""
    return tl.where(i < 2, tl.where(i < 1, a, b), tl.where(i < 3, c, d))


@triton.jit
def _here(tokens, BLOCK_TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's sample, int64, its first token, and how many programs the sample has, of so many tokens each."""
    programs = tl.cdiv(tokens, BLOCK_TOKENS)
    return (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs * BLOCK_TOKENS, programs


@triton.jit
def _begin(words, number, tokens, BLOCK_TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Nobody has arrived yet, in the launch `number`: says the first program of a sample."""
    sample, first_token, _ = _here(tokens, BLOCK_TOKENS)
    if first_token == 0:
        tl.atomic_xchg(words + sample, number << COUNT_BITS, sem="relaxed")


@triton.jit(noinline=True)
def _arrive(words, number, tokens, BLOCK_TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the others see what this program has stored so far."""
    sample, _, _ = _here(tokens, BLOCK_TOKENS)
    tl.debug_barrier()  # before it, by all threads
    found = tl.atomic_add(words + sample, 1, sem="release")
    while (found >> COUNT_BITS) != number:  # not begun: what was added is lost
        found = tl.atomic_add(words + sample, 1, sem="release")
    tl.debug_barrier()


@triton.jit
def _wait(word, arrived):  # type: ignore[no-untyped-def]
    """Until a word is as high; from then on this program sees what they let it see who have arrived."""
    tl.debug_barrier()
    found = tl.atomic_add(word, 0, sem="acquire")
    while found < arrived:
        found = tl.atomic_add(word, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _leave(words, number, stages, tokens, BLOCK_TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait no more, after all have arrived `stages` times."""
    sample, _, programs = _here(tokens, BLOCK_TOKENS)
    if tl.atomic_add(words + sample, 1, sem="relaxed") == (number << COUNT_BITS) + (stages + 1) * programs - 1:
        tl.atomic_xchg(words + sample, 0, sem="relaxed")


@triton.jit
def _linear(  # type: ignore[no-untyped-def]
    x, rows, there, weight, output, wanted, TERMS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """x [T, U] + values weight[output] [U, TERMS]^T, with values [T, TERMS] at `rows` [T, 1]."""
    for first in range(0, TERMS, BLOCK):
        term = first + tl.arange(0, BLOCK)
        values = tl.load(rows + term[None, :], mask=there & (term < TERMS)[None, :], other=0.0)
        w = tl.load(weight + output[None, :] * TERMS + term[:, None], mask=wanted & (term < TERMS)[:, None], other=0.0)
        x = tl.dot(values, w, x, out_dtype=x.dtype, input_precision=PRECISION)
    return x


@triton.jit
def _wave(angle, cosine):  # type: ignore[no-untyped-def]
    """sin(angle), where `cosine` cos(angle). In float32 it is off by 1e-7 at most, for angles up to 10,000.

    There is no branch for huge angles, which would take registers and local memory.
    """
    if angle.dtype == tl.float64:
        return tl.where(cosine, tl.cos(angle), tl.sin(angle))
    else:
        quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
        # pi / 2 in three parts, of which the multiples of the first two are exact
        x = angle - quarters * 1.5703125
        x = x - quarters * 4.837512969970703125e-4
        x = x - quarters * 7.549789954891882e-8
        square = x * x
        sine = 2.7557319e-6 * square - 1.9841270e-4
        sine = (sine * square + 8.3333333e-3) * square - 1.6666667e-1
        sine = sine * square * x + x
        other = (-2.7557319e-7 * square + 2.4801587e-5) * square - 1.3888889e-3
        other = ((other * square + 4.1666667e-2) * square - 0.5) * square + 1.0
        quadrant = quarters.to(tl.int32) + cosine.to(tl.int32)
        value = tl.where((quadrant & 1) == 0, sine, other)
        return tl.where((quadrant & 2) == 0, value, -value)


@triton.jit
def _position(  # type: ignore[no-untyped-def]
    x, coords, there, longer, frequency, weight, output, wanted,
    FREQUENCIES: tl.constexpr, PATCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x [T, U] + what the linear layer of `weight` [U, 4 FREQUENCIES] makes of the places of patches.

    coords [T, 1]: addresses of (y, x). A place's waves are the sines of its y, the cosines, and those of its x.
    """
    for first in range(0, 4 * FREQUENCIES, 16):
        wave = first + tl.arange(0, 16)
        exists = wave < 4 * FREQUENCIES
        corner = tl.load(coords + (wave // (2 * FREQUENCIES))[None, :], mask=there & exists[None, :], other=0)
        place = divide(corner.to(tl.float32) + PATCH / 2, longer.to(tl.float32))
        place = tl.minimum(tl.maximum(place, -1.0), 2.0).to(x.dtype)
        angle = place * tl.load(frequency + wave % FREQUENCIES, mask=exists, other=0.0).to(x.dtype)[None, :]
        values = _wave(angle, (wave // FREQUENCIES % 2 == 1)[None, :])
        w = tl.load(
            weight + output[None, :] * (4 * FREQUENCIES) + wave[:, None], mask=wanted & exists[:, None], other=0.0
        )
        x = tl.dot(values.to(w.dtype), w, x, out_dtype=x.dtype, input_precision=PRECISION)
    return x


@triton.jit
def _bias(bias, channel, inside, ACCUMULATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """[1, C]."""
    return tl.load(bias + channel[None, :], mask=inside, other=0.0).to(ACCUMULATION)


@triton.jit(noinline=True)
def _embed(  # type: ignore[no-untyped-def]
    hidden, coords, longer, registers, token_weight, token_bias, context_weight, context_bias,
    position_weight, position_bias, frequency, level, role, norm_weight, norm_bias, eps,
    residual, count,
    D: tl.constexpr, CHANNELS: tl.constexpr, REGISTERS: tl.constexpr, TOKEN_TERMS: tl.constexpr,
    CONTEXT_TERMS: tl.constexpr, FREQUENCIES: tl.constexpr, PATCH: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_TERMS: tl.constexpr, ACCUMULATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens of patches and registers, to `residual`."""
    sample, first_token, _ = _here(count + REGISTERS, BLOCK_TOKENS)
    token = first_token + tl.arange(0, BLOCK_TOKENS)[:, None]
    there = token < count + REGISTERS
    is_patch = there & (token >= REGISTERS)
    channel = tl.arange(0, CHANNELS)
    inside = (channel < D)[None, :]
    place = sample * count + token - REGISTERS
    rows = hidden + place * (TOKEN_TERMS + CONTEXT_TERMS)
    x = tl.zeros([BLOCK_TOKENS, CHANNELS], ACCUMULATION)
    x += _bias(token_bias, channel, inside, ACCUMULATION) + _bias(context_bias, channel, inside, ACCUMULATION)
    x += _bias(position_bias, channel, inside, ACCUMULATION)
    x += _bias(level, channel, inside, ACCUMULATION) + _bias(role, channel, inside, ACCUMULATION)
    x = _linear(x, rows, is_patch, token_weight, channel, inside, TOKEN_TERMS, BLOCK_TERMS, PRECISION)
    rows += TOKEN_TERMS
    x = _linear(x, rows, is_patch, context_weight, channel, inside, CONTEXT_TERMS, BLOCK_TERMS, PRECISION)
    x = _position(
        x, coords + 2 * place, is_patch, longer, frequency, position_weight, channel, inside,
        FREQUENCIES, PATCH, PRECISION,
    )  # fmt: skip
    mean, deviation = _statistics(x, inside, eps, D)
    x = _normalised(x, mean, deviation, norm_weight, norm_bias, channel, D)
    register = tl.load(registers + token * D + channel[None, :], mask=(token < REGISTERS) & inside, other=0.0)
    x = tl.where(is_patch, x, register.to(ACCUMULATION))
    to = residual + (sample * (count + REGISTERS) + token) * D
    tl.store(to + channel[None, :], x, mask=there & inside)


@triton.jit
def _normalise(  # type: ignore[no-untyped-def]
    residual, weight, bias, eps, scratch, row, there,
    D: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_INNER: tl.constexpr, ACCUMULATION: tl.constexpr,
):  # fmt: skip
    """LayerNorm of rows [T, 1] of `residual`: [T, C] of the type of `scratch`, and also there if it will be read so."""
    channel = tl.arange(0, CHANNELS)
    inside = (channel < D)[None, :]
    x = tl.load(residual + row + channel[None, :], mask=there & inside, other=0.0)
    mean, deviation = _statistics(x, inside, eps, D)
    x = _normalised(x, mean, deviation, weight, bias, channel, D).to(scratch.dtype.element_ty)
    if CHANNELS > BLOCK_INNER:
        tl.store(scratch + row + channel[None, :], x, mask=there & inside)
        tl.debug_barrier()
    return x


@triton.jit(noinline=True)
def _project(  # type: ignore[no-untyped-def]
    residual, norm_weight, norm_bias, eps, weight, bias, scale, scratch,
    found, i, block_stride, sample_stride, first_row, tokens,
    WIDTH: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_INNER: tl.constexpr, ACCUMULATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the WIDTH outputs of a linear layer of normalised tokens, times `scale`, to rows of `found` for block i."""
    sample, first_token, _ = _here(tokens, BLOCK_TOKENS)
    token = first_token + tl.arange(0, BLOCK_TOKENS)[:, None]
    there = token < tokens
    row = (sample * tokens + token) * D
    held = _normalise(
        residual, norm_weight, norm_bias, eps, scratch, row, there, D, CHANNELS, BLOCK_INNER, ACCUMULATION
    )
    found += tl.cast(i, tl.int64) * block_stride + sample * sample_stride
    to = found + (first_row + token).to(tl.int64) * WIDTH
    for first in range(0, WIDTH, BLOCK_OUTPUTS):
        output = first + tl.arange(0, BLOCK_OUTPUTS)
        wanted = (output < WIDTH)[None, :]
        x = tl.zeros([BLOCK_TOKENS, BLOCK_OUTPUTS], ACCUMULATION) + _bias(bias, output, wanted, ACCUMULATION)
        x = _product(x, held, scratch + row, there, weight, output, wanted, D, BLOCK_INNER, PRECISION)
        tl.store(to + output[None, :], (x * scale).to(found.dtype.element_ty), mask=there & wanted)


@triton.jit(noinline=True)
def _attend(  # type: ignore[no-untyped-def]
    queries, memory, memory_stride, memory_length, cache, i, cache_block, cache_stride, earlier, scratch,
    words, number, tokens,
    D: tl.constexpr, HEADS: tl.constexpr, HEAD_CHANNELS: tl.constexpr, TOGETHER: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_HEADS: tl.constexpr, SPLITS: tl.constexpr,
    ACCUMULATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention to the rows of memory and of the cache of block i, to `scratch`; waits before the tokens' own rows."""
    WIDTH: tl.constexpr = 2 * D
    CHANNELS: tl.constexpr = BLOCK_HEADS * HEAD_CHANNELS
    dtype = scratch.dtype.element_ty
    sample, first_token, programs = _here(tokens, BLOCK_TOKENS)
    token = first_token + tl.arange(0, BLOCK_TOKENS)
    there = token < tokens
    row = (sample * tokens + token) * D

    # A group is a head and one in SPLITS of every block of keys.
    GROUPS: tl.constexpr = BLOCK_HEADS * SPLITS
    group = tl.arange(0, GROUPS)
    head = (group // SPLITS)[:, None, None]
    channel = head * HEAD_CHANNELS + tl.arange(0, HEAD_CHANNELS)[None, None, :]  # [g, 1, c]
    shown = head < HEADS
    q = tl.load(queries + (row[None, :, None] + channel), mask=shown & there[None, :, None], other=0.0)  # [g, t, c]
    memory += sample * memory_stride
    cache += tl.cast(i, tl.int64) * cache_block + sample * cache_stride - memory_length.to(tl.int64) * WIDTH
    most = tl.full([GROUPS, BLOCK_TOKENS], float("-inf"), ACCUMULATION)
    total = tl.zeros([GROUPS, BLOCK_TOKENS], ACCUMULATION)
    attended = tl.zeros([GROUPS, BLOCK_TOKENS, HEAD_CHANNELS], ACCUMULATION)
    first, end = 0, memory_length + earlier
    for part in tl.range(0, 2, num_stages=1):
        if TOGETHER:  # noqa: SIM102 - what is known when this is compiled, and what is not
            if part == 1:
                _wait(words + sample, (number << COUNT_BITS) + (i + 1) * programs)
        for some in range(first, end, SPLITS * BLOCK_KEYS):
            key = some + (group % SPLITS)[:, None] * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)[None, :]  # [g, m]
            seen = key < end
            at = tl.where(key < memory_length, memory, cache) + key.to(tl.int64) * WIDTH
            to_load = shown & seen[:, :, None]
            k = tl.load(at[:, :, None] + channel, mask=to_load, other=0.0)  # [g, m, c]
            v = tl.load(at[:, :, None] + (channel + D), mask=to_load, other=0.0)
            scores = tl.dot(q, tl.permute(k, (0, 2, 1)), out_dtype=ACCUMULATION, input_precision=PRECISION)  # [g, t, m]
            scores = tl.where(seen[:, None, :], scores, float("-inf"))
            more = tl.maximum(most, tl.max(scores, 2))
            base = tl.where(more == float("-inf"), 0.0, more)
            weights = tl.exp2(scores - base[:, :, None])
            shrink = tl.exp2(most - base)
            total = total * shrink + tl.sum(weights, 2)
            attended = tl.dot(
                weights.to(dtype), v, attended * shrink[:, :, None], out_dtype=ACCUMULATION, input_precision=PRECISION
            )
            most = more
        first, end = end, end + tokens
    if SPLITS > 1:
        parts = tl.reshape(most, (BLOCK_HEADS, SPLITS, BLOCK_TOKENS))
        whole = tl.max(parts, 1)[:, None, :]
        of_part = tl.exp2(parts - tl.where(whole == float("-inf"), 0.0, whole))  # [h, s, t]
        sums = tl.sum(tl.reshape(total, (BLOCK_HEADS, SPLITS, BLOCK_TOKENS)) * of_part, 1)
        values = tl.reshape(attended, (BLOCK_HEADS, SPLITS, BLOCK_TOKENS, HEAD_CHANNELS))
        values = tl.sum(values * of_part[:, :, :, None], 1) / sums[:, :, None]
    else:
        values = attended / total[:, :, None]
    values = tl.reshape(tl.permute(values, (1, 0, 2)), (BLOCK_TOKENS, CHANNELS)).to(dtype)
    of_row = tl.arange(0, CHANNELS)[None, :]
    tl.store(scratch + row[:, None] + of_row, values, mask=there[:, None] & (of_row < D))


@triton.jit(noinline=True)
def _add(  # type: ignore[no-untyped-def]
    residual, weight, bias, scratch, tokens,
    D: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    ACCUMULATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to `residual` what a linear layer makes of the rows of `scratch`."""
    sample, first_token, _ = _here(tokens, BLOCK_TOKENS)
    token = first_token + tl.arange(0, BLOCK_TOKENS)[:, None]
    there = token < tokens
    row = (sample * tokens + token) * D
    channel = tl.arange(0, CHANNELS)
    inside = (channel < D)[None, :]
    at = residual + row + channel[None, :]
    x = tl.load(at, mask=there & inside, other=0.0) + _bias(bias, channel, inside, ACCUMULATION)
    x = _linear(x, scratch + row, there, weight, channel, inside, D, BLOCK_INNER, PRECISION)
    tl.debug_barrier()  # other threads have read what this one replaces
    tl.store(at, x, mask=there & inside)


@triton.jit(noinline=True)
def _add_mlp(  # type: ignore[no-untyped-def]
    residual, norm_weight, norm_bias, eps, in_weight, in_bias, out_weight, out_bias, scratch, tokens,
    HIDDEN: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_INNER: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, ACCUMULATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to `residual` what the MLP makes of it."""
    sample, first_token, _ = _here(tokens, BLOCK_TOKENS)
    token = first_token + tl.arange(0, BLOCK_TOKENS)[:, None]
    there = token < tokens
    row = (sample * tokens + token) * D
    channel = tl.arange(0, CHANNELS)
    inside = (channel < D)[None, :]
    held = _normalise(
        residual, norm_weight, norm_bias, eps, scratch, row, there, D, CHANNELS, BLOCK_INNER, ACCUMULATION
    )
    at = residual + row + channel[None, :]
    x = tl.load(at, mask=there & inside, other=0.0) + _bias(out_bias, channel, inside, ACCUMULATION)
    for first in range(0, HIDDEN, BLOCK_HIDDEN):
        unit = first + tl.arange(0, BLOCK_HIDDEN)
        used = unit < HIDDEN
        units = tl.zeros([BLOCK_TOKENS, BLOCK_HIDDEN], ACCUMULATION)
        units += _bias(in_bias, unit, used[None, :], ACCUMULATION)
        units = _product(units, held, scratch + row, there, in_weight, unit, used[None, :], D, BLOCK_INNER, PRECISION)
        down = tl.load(out_weight + channel[None, :] * HIDDEN + unit[:, None], mask=inside & used[:, None], other=0.0)
        x = tl.dot(gelu(units).to(down.dtype), down, x, out_dtype=ACCUMULATION, input_precision=PRECISION)
    tl.debug_barrier()
    tl.store(at, x, mask=there & inside)


@triton.jit(noinline=True)
def _finish(  # type: ignore[no-untyped-def]
    residual, weight, bias, eps, out, count,
    D: tl.constexpr, CHANNELS: tl.constexpr, REGISTERS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """out [B, K, D]: the tokens of patches, normalised."""
    sample, first_token, _ = _here(count + REGISTERS, BLOCK_TOKENS)
    token = first_token + tl.arange(0, BLOCK_TOKENS)[:, None]
    there = token < count + REGISTERS
    channel = tl.arange(0, CHANNELS)
    inside = (channel < D)[None, :]
    at = residual + (sample * (count + REGISTERS) + token) * D
    x = tl.load(at + channel[None, :], mask=there & inside, other=0.0)
    mean, deviation = _statistics(x, inside, eps, D)
    x = _normalised(x, mean, deviation, weight, bias, channel, D)
    to = out + (sample * count + token - REGISTERS) * D + channel[None, :]
    tl.store(to, x.to(out.dtype.element_ty), mask=there & (token >= REGISTERS) & inside)


@triton.jit(
    do_not_specialize=["longer", "number", "count", "memory_length", "start", "first_stage", "last_stage"],
)
def attend_kernel(  # type: ignore[no-untyped-def]
    hidden, coords, longer, registers, token_weight, token_bias, context_weight, context_bias,
    position_weight, position_bias, frequency, level, role, entry_weight, entry_bias, entry_eps,
    final_weight, final_bias, final_eps,
    norm_weight_0, norm_weight_1, norm_weight_2, norm_weight_3, norm_bias_0, norm_bias_1, norm_bias_2, norm_bias_3,
    query_weight_0, query_weight_1, query_weight_2, query_weight_3,
    query_bias_0, query_bias_1, query_bias_2, query_bias_3,
    key_value_weight_0, key_value_weight_1, key_value_weight_2, key_value_weight_3,
    key_value_bias_0, key_value_bias_1, key_value_bias_2, key_value_bias_3,
    out_weight_0, out_weight_1, out_weight_2, out_weight_3, out_bias_0, out_bias_1, out_bias_2, out_bias_3,
    norm_mlp_weight_0, norm_mlp_weight_1, norm_mlp_weight_2, norm_mlp_weight_3,
    norm_mlp_bias_0, norm_mlp_bias_1, norm_mlp_bias_2, norm_mlp_bias_3,
    mlp_in_weight_0, mlp_in_weight_1, mlp_in_weight_2, mlp_in_weight_3,
    mlp_in_bias_0, mlp_in_bias_1, mlp_in_bias_2, mlp_in_bias_3,
    mlp_out_weight_0, mlp_out_weight_1, mlp_out_weight_2, mlp_out_weight_3,
    mlp_out_bias_0, mlp_out_bias_1, mlp_out_bias_2, mlp_out_bias_3, eps,
    memory_0, memory_1, memory_2, memory_3, memory_stride, memory_length, cache, cache_block, cache_stride, start,
    residual, queries, scratch, words, out, number, scale, count, first_stage, last_stage,
    DEPTH: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HEAD_CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    REGISTERS: tl.constexpr, TOKEN_TERMS: tl.constexpr, CONTEXT_TERMS: tl.constexpr, FREQUENCIES: tl.constexpr,
    PATCH: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_TERMS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, ACCUMULATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, K, D], and the rows from `start` on of every block's cache, on a grid of B times the blocks of tokens.

    In stage 0 tokens are embedded, in stage s > 0 they go through block s - 1; after every stage they get the keys of
    the next block, after the last the final norm. TOGETHER: the launch is of all stages, whose programs wait for each
    other; otherwise it is of one, so that programs may run one after the other.
    residual: the tokens, in the type of sums; queries: with the factors of scores that make exp an exp2; scratch: what
    a product reads in several blocks. Of those a program reads its own rows alone.
    """
    CHANNELS: tl.constexpr = BLOCK_HEADS * HEAD_CHANNELS
    tokens = count + REGISTERS
    if TOGETHER:
        _begin(words, number, tokens, BLOCK_TOKENS)
    for stage in tl.range(first_stage, last_stage, num_stages=1):
        if stage == 0:
            _embed(
                hidden, coords, longer, registers, token_weight, token_bias, context_weight, context_bias,
                position_weight, position_bias, frequency, level, role, entry_weight, entry_bias, entry_eps,
                residual, count,
                D, CHANNELS, REGISTERS, TOKEN_TERMS, CONTEXT_TERMS, FREQUENCIES, PATCH, BLOCK_TOKENS, BLOCK_TERMS,
                ACCUMULATION, PRECISION,
            )  # fmt: skip
        else:
            i = stage - 1
            _attend(
                queries, _of_block(i, memory_0, memory_1, memory_2, memory_3), memory_stride, memory_length,
                cache, i, cache_block, cache_stride, start, scratch,
                words, number, tokens,
                D, HEADS, HEAD_CHANNELS, TOGETHER, BLOCK_TOKENS, BLOCK_KEYS, BLOCK_HEADS, SPLITS,
                ACCUMULATION, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
            _add(
                residual, _of_block(i, out_weight_0, out_weight_1, out_weight_2, out_weight_3),
                _of_block(i, out_bias_0, out_bias_1, out_bias_2, out_bias_3), scratch, tokens,
                D, CHANNELS, BLOCK_TOKENS, BLOCK_INNER, ACCUMULATION, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
            _add_mlp(
                residual, _of_block(i, norm_mlp_weight_0, norm_mlp_weight_1, norm_mlp_weight_2, norm_mlp_weight_3),
                _of_block(i, norm_mlp_bias_0, norm_mlp_bias_1, norm_mlp_bias_2, norm_mlp_bias_3), eps,
                _of_block(i, mlp_in_weight_0, mlp_in_weight_1, mlp_in_weight_2, mlp_in_weight_3),
                _of_block(i, mlp_in_bias_0, mlp_in_bias_1, mlp_in_bias_2, mlp_in_bias_3),
                _of_block(i, mlp_out_weight_0, mlp_out_weight_1, mlp_out_weight_2, mlp_out_weight_3),
                _of_block(i, mlp_out_bias_0, mlp_out_bias_1, mlp_out_bias_2, mlp_out_bias_3), scratch, tokens,
                HIDDEN, D, CHANNELS, BLOCK_TOKENS, BLOCK_INNER, BLOCK_HIDDEN, ACCUMULATION, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()
        if stage < DEPTH:
            norm_weight = _of_block(stage, norm_weight_0, norm_weight_1, norm_weight_2, norm_weight_3)
            norm_bias = _of_block(stage, norm_bias_0, norm_bias_1, norm_bias_2, norm_bias_3)
            _project(
                residual, norm_weight, norm_bias, eps,
                _of_block(stage, key_value_weight_0, key_value_weight_1, key_value_weight_2, key_value_weight_3),
                _of_block(stage, key_value_bias_0, key_value_bias_1, key_value_bias_2, key_value_bias_3), 1.0,
                scratch, cache, stage, cache_block, cache_stride, start, tokens,
                2 * D, D, CHANNELS, BLOCK_TOKENS, BLOCK_OUTPUTS, BLOCK_INNER, ACCUMULATION, PRECISION,
            )  # fmt: skip
            if TOGETHER:
                _arrive(words, number, tokens, BLOCK_TOKENS)
            else:
                tl.debug_barrier()
            _project(
                residual, norm_weight, norm_bias, eps,
                _of_block(stage, query_weight_0, query_weight_1, query_weight_2, query_weight_3),
                _of_block(stage, query_bias_0, query_bias_1, query_bias_2, query_bias_3), scale,
                scratch, queries, 0, 0, tokens * D, 0, tokens,
                D, D, CHANNELS, BLOCK_TOKENS, BLOCK_OUTPUTS, BLOCK_INNER, ACCUMULATION, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
        else:
            if TOGETHER:
                _leave(words, number, DEPTH, tokens, BLOCK_TOKENS)
                tl.debug_barrier()
            _finish(
                residual, final_weight, final_bias, final_eps, out, count,
                D, CHANNELS, REGISTERS, BLOCK_TOKENS,
            )  # fmt: skip


BLOCK_TOKENS, WARPS = 16, 8


@functools.lru_cache(maxsize=1024)
def attend_options(
    depth: int, dim: int, heads: int, hidden: int, registers: int, token_terms: int, context_terms: int,
    frequencies: int, dtype: torch.dtype, tf32: bool, together: bool,
) -> dict[str, Any]:  # fmt: skip
    """Constants of `attend_kernel`, and options of its launch.

    Without tensor cores (`fma`) a thread holds whole rows of both factors of a product, so the inner blocks are small.
    """
    block_heads, width = triton.next_power_of_2(heads), dim // heads
    channels = block_heads * width
    half, fma = dtype.itemsize == 2, dtype.itemsize > 2 and not tf32
    block_keys = 32 if channels <= 128 else 16
    room = 16384 // (block_keys * channels * dtype.itemsize)  # bytes of keys in a block
    return {
        "DEPTH": depth,
        "D": dim,
        "HEADS": heads,
        "HEAD_CHANNELS": width,
        "HIDDEN": hidden,
        "REGISTERS": registers,
        "TOKEN_TERMS": token_terms,
        "CONTEXT_TERMS": context_terms,
        "FREQUENCIES": frequencies,
        "PATCH": 8,
        "TOGETHER": together,
        "BLOCK_TOKENS": BLOCK_TOKENS,
        "BLOCK_TERMS": 64 if half else 32,
        "BLOCK_OUTPUTS": 32 if fma else 64,
        "BLOCK_INNER": min(channels, 32 if not half else 128 if channels <= 128 else 64),
        "BLOCK_KEYS": block_keys,
        "BLOCK_HEADS": block_heads,
        "SPLITS": 1 if fma else max(1, min(WARPS // block_heads, room)),
        "BLOCK_HIDDEN": min(max(triton.next_power_of_2(hidden), 16), 64 if channels <= 128 else 32),
        "ACCUMULATION": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 and dtype == torch.float32 else "ieee",
        "num_warps": max(WARPS, min(block_heads, 16)),
        "num_stages": 3 if half and channels <= 128 else 2,
    }


_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def _compilation(dtype: torch.dtype, tf32: bool = False) -> Compilation:
    """At the model's sizes."""
    options = attend_options(4, 128, 4, 256, 4, 768, 512, 12, dtype, tf32, True)
    kinds = dict.fromkeys(("longer", "memory_stride", "memory_length", "cache_block", "cache_stride", "start"), "i32")
    kinds |= dict.fromkeys(("count", "first_stage", "last_stage"), "i32") | {"number": "i64"}
    kinds |= dict.fromkeys(("eps", "entry_eps", "final_eps", "scale"), "fp32")
    kinds |= {"coords": "*i64", "words": "*i64", "residual": "*fp32"}
    names = [name for name in attend_kernel.arg_names if name not in options]
    return Compilation(
        f"cascade attend: {_TYPES[dtype]}{' tf32' if tf32 else ''}",
        attend_kernel,
        {name: kinds.get(name, f"*{_TYPES[dtype]}") for name in names},
        {name: value for name, value in options.items() if name in attend_kernel.arg_names},
        aligned=("memory_stride", "cache_block", "cache_stride"),
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        tensor_cores=dtype.itemsize == 2 or tf32,
    )


COMPILATIONS = [
    _compilation(torch.float32),
    _compilation(torch.float32, tf32=True),
    _compilation(torch.float16),
    _compilation(torch.bfloat16),
]
