"""The kernel of attend_patches: from the hidden units of a level's tokens to what its transformer makes of them.

A program takes BLOCK_TOKENS tokens of a sample through all blocks. A block's keys are those of all tokens of the sample,
so its programs wait for each other once a block: each counts itself into a word of its sample when its keys are written,
attends to the keys of the memory and of earlier tokens, and waits for the others before it attends to the new ones.

A word starts as whatever memory held, for nothing clears it before the launch. The sample's first program sets it to the
number of the launch, above COUNT_BITS bits of a count; a program has counted itself in once it found that number there,
and the last that leaves clears it, so that the number is not there when a CUDA graph launches the kernel again.
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
def _begin(word, number):  # type: ignore[no-untyped-def]
    """Nobody has arrived yet, in the launch `number`: by the first program of a sample."""
    tl.atomic_xchg(word, number << COUNT_BITS, sem="relaxed")


@triton.jit
def _arrive(word, number):  # type: ignore[no-untyped-def]
    """Let the others see what this program has stored so far."""
    tl.debug_barrier()  # before it, by all threads
    found = tl.atomic_add(word, 1, sem="release")
    while (found >> COUNT_BITS) != number:  # not begun: what was added is lost
        found = tl.atomic_add(word, 1, sem="release")


@triton.jit
def _wait(word, number, arrivals):  # type: ignore[no-untyped-def]
    """Until there have been so many arrivals; from then on this program sees what they let it see."""
    found = tl.atomic_add(word, 0, sem="acquire")
    while found < (number << COUNT_BITS) + arrivals:
        found = tl.atomic_add(word, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _leave(word, number, arrivals):  # type: ignore[no-untyped-def]
    """Wait no more; `arrivals`: all before, and of those that leave all but one."""
    if tl.atomic_add(word, 1, sem="relaxed") == (number << COUNT_BITS) + arrivals:
        tl.atomic_xchg(word, 0, sem="relaxed")


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
        values = tl.where((wave // FREQUENCIES % 2 == 0)[None, :], tl.sin(angle), tl.cos(angle))
        w = tl.load(
            weight + output[None, :] * (4 * FREQUENCIES) + wave[:, None], mask=wanted & exists[:, None], other=0.0
        )
        x = tl.dot(values.to(w.dtype), w, x, out_dtype=x.dtype, input_precision=PRECISION)
    return x


@triton.jit
def _bias(bias, channel, inside, ACCUMULATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """[1, C]."""
    return tl.load(bias + channel[None, :], mask=inside, other=0.0).to(ACCUMULATION)


@triton.jit
def _outputs(  # type: ignore[no-untyped-def]
    held, stored, there, weight, bias, scale, found,
    WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr, ACCUMULATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the WIDTH outputs of a linear layer, times `scale`, to `found` [T, 1]; its inputs: as of `_product`."""
    for first in range(0, WIDTH, BLOCK_OUTPUTS):
        output = first + tl.arange(0, BLOCK_OUTPUTS)
        wanted = (output < WIDTH)[None, :]
        x = tl.zeros([BLOCK_TOKENS, BLOCK_OUTPUTS], ACCUMULATION) + _bias(bias, output, wanted, ACCUMULATION)
        x = _product(x, held, stored, there, weight, output, wanted, D, BLOCK_INNER, PRECISION)
        tl.store(found + output[None, :], (x * scale).to(found.dtype.element_ty), mask=there & wanted)


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
    WIDTH: tl.constexpr = 2 * D
    CHANNELS: tl.constexpr = BLOCK_HEADS * HEAD_CHANNELS
    STORED: tl.constexpr = CHANNELS > BLOCK_INNER
    tokens = count + REGISTERS
    programs = tl.cdiv(tokens, BLOCK_TOKENS)
    sample = (tl.program_id(0) // programs).to(tl.int64)
    word = words + sample
    if TOGETHER:
        if tl.program_id(0) % programs == 0:
            _begin(word, number)

    token = tl.program_id(0) % programs * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    exists = token < tokens
    there = exists[:, None]
    row = (sample * tokens + token) * D
    own = row[:, None]
    channel = tl.arange(0, CHANNELS)
    inside = (channel < D)[None, :]
    written = there & inside
    staged = scratch + own
    dtype = out.dtype.element_ty

    # A group is a head and one in SPLITS of every block of keys.
    GROUPS: tl.constexpr = BLOCK_HEADS * SPLITS
    group = tl.arange(0, GROUPS)
    head = (group // SPLITS)[:, None, None]
    of_head = head * HEAD_CHANNELS + tl.arange(0, HEAD_CHANNELS)[None, None, :]  # [g, 1, c]
    shown = head < HEADS

    for stage in tl.range(first_stage, last_stage, num_stages=1):
        if stage == 0:
            patch = (token - REGISTERS)[:, None]
            is_patch = there & (patch >= 0)
            place = sample * count + patch
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
            mean, deviation = _statistics(x, inside, entry_eps, D)
            x = _normalised(x, mean, deviation, entry_weight, entry_bias, channel, D)
            register = token[:, None]
            of_registers = tl.load(
                registers + register * D + channel[None, :], mask=(register < REGISTERS) & inside, other=0.0
            )
            x = tl.where(is_patch, x, of_registers.to(ACCUMULATION))
        else:
            i = stage - 1
            q = tl.load(queries + (row[None, :, None] + of_head), mask=shown & exists[None, :, None], other=0.0)
            rows_of_memory = _of_block(i, memory_0, memory_1, memory_2, memory_3) + sample * memory_stride
            rows_of_cache = cache + tl.cast(i, tl.int64) * cache_block + sample * cache_stride
            rows_of_cache -= memory_length.to(tl.int64) * WIDTH
            most = tl.full([GROUPS, BLOCK_TOKENS], float("-inf"), ACCUMULATION)
            total = tl.zeros([GROUPS, BLOCK_TOKENS], ACCUMULATION)
            attended = tl.zeros([GROUPS, BLOCK_TOKENS, HEAD_CHANNELS], ACCUMULATION)
            first, end = 0, memory_length + start  # keys that are there already, then the tokens' own
            for part in tl.range(0, 2, num_stages=1):
                if TOGETHER:
                    if part == 1:
                        _wait(word, number, stage * programs)
                for some in range(first, end, SPLITS * BLOCK_KEYS):
                    key = some + (group % SPLITS)[:, None] * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)[None, :]  # [g, m]
                    seen = key < end
                    at = tl.where(key < memory_length, rows_of_memory, rows_of_cache) + key.to(tl.int64) * WIDTH
                    to_load = shown & seen[:, :, None]
                    k = tl.load(at[:, :, None] + of_head, mask=to_load, other=0.0)  # [g, m, c]
                    v = tl.load(at[:, :, None] + (of_head + D), mask=to_load, other=0.0)
                    scores = tl.dot(q, tl.permute(k, (0, 2, 1)), out_dtype=ACCUMULATION, input_precision=PRECISION)
                    scores = tl.where(seen[:, None, :], scores, float("-inf"))  # [g, t, m]
                    more = tl.maximum(most, tl.max(scores, 2))
                    base = tl.where(more == float("-inf"), 0.0, more)
                    weights = tl.exp2(scores - base[:, :, None])
                    shrink = tl.exp2(most - base)
                    total = total * shrink + tl.sum(weights, 2)
                    attended = attended * shrink[:, :, None]
                    attended = tl.dot(
                        weights.to(dtype), v, attended, out_dtype=ACCUMULATION, input_precision=PRECISION
                    )
                    most = more
                first, end = end, end + tokens
            if SPLITS > 1:
                most = tl.reshape(most, (BLOCK_HEADS, SPLITS, BLOCK_TOKENS))
                more = tl.max(most, 1)[:, None, :]
                shrink = tl.exp2(most - tl.where(more == float("-inf"), 0.0, more))  # [h, s, t]
                total = tl.sum(tl.reshape(total, (BLOCK_HEADS, SPLITS, BLOCK_TOKENS)) * shrink, 1)
                attended = tl.reshape(attended, (BLOCK_HEADS, SPLITS, BLOCK_TOKENS, HEAD_CHANNELS))
                attended = tl.sum(attended * shrink[:, :, :, None], 1)
            attended = attended / total[:, :, None]

            # From here on one row [C] a token.
            attended = tl.reshape(tl.permute(attended, (1, 0, 2)), (BLOCK_TOKENS, CHANNELS)).to(dtype)
            if STORED:
                tl.debug_barrier()
                tl.store(staged + channel[None, :], attended, mask=written)
                tl.debug_barrier()
            x = tl.load(residual + own + channel[None, :], mask=written, other=0.0)
            x += _bias(_of_block(i, out_bias_0, out_bias_1, out_bias_2, out_bias_3), channel, inside, ACCUMULATION)
            x = _product(
                x, attended, staged, there, _of_block(i, out_weight_0, out_weight_1, out_weight_2, out_weight_3),
                channel, inside, D, BLOCK_INNER, PRECISION,
            )  # fmt: skip
            mean, deviation = _statistics(x, inside, eps, D)
            gain = _of_block(i, norm_mlp_weight_0, norm_mlp_weight_1, norm_mlp_weight_2, norm_mlp_weight_3)
            shift = _of_block(i, norm_mlp_bias_0, norm_mlp_bias_1, norm_mlp_bias_2, norm_mlp_bias_3)
            normalised = _normalised(x, mean, deviation, gain, shift, channel, D).to(dtype)
            if STORED:
                tl.debug_barrier()
                tl.store(staged + channel[None, :], normalised, mask=written)
                tl.debug_barrier()
            mlp_in_weight = _of_block(i, mlp_in_weight_0, mlp_in_weight_1, mlp_in_weight_2, mlp_in_weight_3)
            mlp_in_bias = _of_block(i, mlp_in_bias_0, mlp_in_bias_1, mlp_in_bias_2, mlp_in_bias_3)
            mlp_out_weight = _of_block(i, mlp_out_weight_0, mlp_out_weight_1, mlp_out_weight_2, mlp_out_weight_3)
            mlp_out_bias = _of_block(i, mlp_out_bias_0, mlp_out_bias_1, mlp_out_bias_2, mlp_out_bias_3)
            x += _bias(mlp_out_bias, channel, inside, ACCUMULATION)
            for first_unit in range(0, HIDDEN, BLOCK_HIDDEN):
                unit = first_unit + tl.arange(0, BLOCK_HIDDEN)
                used = (unit < HIDDEN)[None, :]
                units = tl.zeros([BLOCK_TOKENS, BLOCK_HIDDEN], ACCUMULATION)
                units += _bias(mlp_in_bias, unit, used, ACCUMULATION)
                units = _product(
                    units, normalised, staged, there, mlp_in_weight, unit, used, D, BLOCK_INNER, PRECISION
                )
                down = tl.load(
                    mlp_out_weight + channel[None, :] * HIDDEN + unit[:, None],
                    mask=inside & (unit < HIDDEN)[:, None], other=0.0,
                )  # fmt: skip
                x = tl.dot(gelu(units).to(dtype), down, x, out_dtype=ACCUMULATION, input_precision=PRECISION)

        if stage < DEPTH:
            tl.debug_barrier()
            tl.store(residual + own + channel[None, :], x, mask=written)
            mean, deviation = _statistics(x, inside, eps, D)
            gain = _of_block(stage, norm_weight_0, norm_weight_1, norm_weight_2, norm_weight_3)
            shift = _of_block(stage, norm_bias_0, norm_bias_1, norm_bias_2, norm_bias_3)
            normalised = _normalised(x, mean, deviation, gain, shift, channel, D).to(dtype)
            if STORED:
                tl.store(staged + channel[None, :], normalised, mask=written)
                tl.debug_barrier()
            to = sample * cache_stride + (start + token).to(tl.int64)[:, None] * WIDTH
            _outputs(
                normalised, staged, there,
                _of_block(stage, key_value_weight_0, key_value_weight_1, key_value_weight_2, key_value_weight_3),
                _of_block(stage, key_value_bias_0, key_value_bias_1, key_value_bias_2, key_value_bias_3),
                1.0, cache + tl.cast(stage, tl.int64) * cache_block + to,
                WIDTH, D, BLOCK_TOKENS, BLOCK_OUTPUTS, BLOCK_INNER, ACCUMULATION, PRECISION,
            )  # fmt: skip
            if TOGETHER:
                _arrive(word, number)
            _outputs(
                normalised, staged, there,
                _of_block(stage, query_weight_0, query_weight_1, query_weight_2, query_weight_3),
                _of_block(stage, query_bias_0, query_bias_1, query_bias_2, query_bias_3), scale, queries + own,
                D, D, BLOCK_TOKENS, BLOCK_OUTPUTS, BLOCK_INNER, ACCUMULATION, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
        else:
            if TOGETHER:
                _leave(word, number, (DEPTH + 1) * programs - 1)
            mean, deviation = _statistics(x, inside, final_eps, D)
            x = _normalised(x, mean, deviation, final_weight, final_bias, channel, D)
            to = out + (sample * count + token - REGISTERS)[:, None] * D + channel[None, :]
            tl.store(to, x.to(dtype), mask=written & (token >= REGISTERS)[:, None])


MOST_BLOCKS = 4
BLOCK_TOKENS = 16


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
    warps = 8 if fma or half else 4
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
        "BLOCK_OUTPUTS": 64 if half else 32,
        "BLOCK_INNER": min(channels, 32 if not half else 128 if channels <= 128 else 64),
        "BLOCK_KEYS": block_keys,
        "BLOCK_HEADS": block_heads,
        "SPLITS": 1 if fma else max(1, min(warps // block_heads, room)),
        "BLOCK_HIDDEN": min(max(triton.next_power_of_2(hidden), 16), 64 if channels <= 128 else 32),
        "ACCUMULATION": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 and dtype == torch.float32 else "ieee",
        "num_warps": max(warps, min(block_heads, 16)),
        "num_stages": 3 if half and channels <= 128 else 2,
    }


_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def _compilation(dtype: torch.dtype, tf32: bool = False, memory: bool = True) -> Compilation:
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
