"""Kernels of transformer_block: one of queries, keys and values, one of all that follows.

Heads are the first dimension of three in products, so that each has warps of its own. Of memory, that comes in
pieces, and of own tokens, rows are read where they lie: one loop over keys, hidden ones are not read.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from icseg_kernels.arithmetic_triton_kernels import gelu
from icseg_kernels.compilation import Compilation


@triton.jit
def _statistics(x, inside, eps, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Means and reciprocal deviations [T, 1] of the rows of x [T, C], of which the channels `inside` [1, C] count."""
    mean = (tl.sum(x, 1) / D)[:, None]
    x = tl.where(inside, x - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]


@triton.jit
def _normalised(x, mean, scale, weight, bias, channel, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """The channels `channel` of a LayerNorm; zero from D on."""
    gain = tl.load(weight + channel, mask=channel < D, other=0.0).to(x.dtype)
    shift = tl.load(bias + channel, mask=channel < D, other=0.0).to(x.dtype)
    return (x - mean) * scale * gain[None, :] + shift[None, :]


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x, held, stored, there, weight, unit, wanted, D: tl.constexpr, BLOCK_INNER: tl.constexpr, PRECISION: tl.constexpr
):
    """x [T, U] + rows weight[unit] [U, D]^T, with rows [T, D] `held`, or if D has several blocks, at `stored`."""
    if BLOCK_INNER >= D:
        inner = tl.arange(0, BLOCK_INNER)[:, None]
        w = tl.load(weight + unit[None, :] * D + inner, mask=wanted & (inner < D), other=0.0)
        x = tl.dot(held, w, x, out_dtype=x.dtype, input_precision=PRECISION)
    else:
        for first in range(0, D, BLOCK_INNER):
            inner = first + tl.arange(0, BLOCK_INNER)
            rows = tl.load(stored + inner[None, :], mask=there & (inner < D)[None, :], other=0.0)
            w = tl.load(weight + unit[None, :] * D + inner[:, None], mask=wanted & (inner < D)[:, None], other=0.0)
            x = tl.dot(rows, w, x, out_dtype=x.dtype, input_precision=PRECISION)
    return x


@triton.jit(do_not_specialize=["samples", "count"])
def project_kernel(  # type: ignore[no-untyped-def]
    tokens, batch_stride, token_stride, norm_weight, norm_bias, query_weight, query_bias, key_value_weight,
    key_value_bias, queries, own, eps, scale, samples, count,
    D: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr, ACCUMULATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """queries [B N, D], times `scale`, and own [B N, 2D], on a grid of (blocks of tokens, blocks of outputs)."""
    row = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    block = tl.program_id(1)
    there = (row < samples * count)[:, None]
    at = tokens + ((row // count).to(tl.int64) * batch_stride + (row % count).to(tl.int64) * token_stride)[:, None]
    channel = tl.arange(0, CHANNELS)
    inside = (channel < D)[None, :]
    x = tl.load(at + channel[None, :], mask=there & inside, other=0.0).to(ACCUMULATION)
    mean, deviation = _statistics(x, inside, eps, D)

    blocks: tl.constexpr = (D + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS
    if block < blocks:
        weight, bias, found, width, factor = query_weight, query_bias, queries, D, scale
    else:
        weight, bias, found, width, factor = key_value_weight, key_value_bias, own, 2 * D, 1.0
        block -= blocks
    output = block * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    wanted = output < width
    result = tl.zeros([BLOCK_TOKENS, BLOCK_OUTPUTS], ACCUMULATION)
    result += tl.load(bias + output, mask=wanted, other=0.0).to(ACCUMULATION)[None, :]
    for first in range(0, D, BLOCK_INNER):
        inner = first + tl.arange(0, BLOCK_INNER)
        exists = (inner < D)[None, :]
        w = tl.load(weight + output[:, None] * D + inner[None, :], mask=wanted[:, None] & exists, other=0.0)
        some = tl.load(at + inner[None, :], mask=there & exists, other=0.0).to(ACCUMULATION)
        some = _normalised(some, mean, deviation, norm_weight, norm_bias, inner, D).to(w.dtype)
        result = tl.dot(some, tl.trans(w), result, out_dtype=ACCUMULATION, input_precision=PRECISION)
    to = found + row.to(tl.int64)[:, None] * width + output[None, :]
    tl.store(to, (result * factor).to(tokens.dtype.element_ty), mask=there & wanted[None, :])


@triton.jit(
    do_not_specialize=[
        "index_stride", "count", "listed", "memory_end",
        "start_1", "start_2", "start_3", "start_4", "start_5", "start_6", "start_7",
    ]
)  # fmt: skip
def attend_kernel(  # type: ignore[no-untyped-def]
    tokens, batch_stride, token_stride, queries, own, index, index_stride, out,
    out_weight, out_bias, norm_weight, norm_bias, mlp_in_weight, mlp_in_bias, mlp_out_weight, mlp_out_bias, eps,
    count, listed, memory_end,
    memory_0, memory_1, memory_2, memory_3, memory_4, memory_5, memory_6, memory_7,
    stride_0, stride_1, stride_2, stride_3, stride_4, stride_5, stride_6, stride_7,
    start_1, start_2, start_3, start_4, start_5, start_6, start_7,
    D: tl.constexpr, HEADS: tl.constexpr, HEAD_CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_HEADS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_INNER: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, ACCUMULATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, N, D] of queries [B, N, D], keys and values of memory and own, and tokens.

    A program for BLOCK_TOKENS tokens, the blocks of a sample one after the other. Piece i of the memory has rows from
    start_i up to start_(i+1) among the keys, own those from memory_end. `queries` hold the factors of scores that make
    exp an exp2.
    """
    WIDTH: tl.constexpr = 2 * D
    CHANNELS: tl.constexpr = BLOCK_HEADS * HEAD_CHANNELS
    blocks = tl.cdiv(count, BLOCK_TOKENS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row = sample * count + token
    there = token < count

    # A group is a head and one in SPLITS of every block of keys.
    GROUPS: tl.constexpr = BLOCK_HEADS * SPLITS
    group = tl.arange(0, GROUPS)
    head = (group // SPLITS)[:, None, None]
    channel = head * HEAD_CHANNELS + tl.arange(0, HEAD_CHANNELS)[None, None, :]  # [g, 1, c]
    shown = head < HEADS
    q = tl.load(queries + row[None, :, None] * D + channel, mask=shown & there[None, :, None], other=0.0)  # [g, t, c]
    own_rows = own + (sample * count - memory_end) * WIDTH
    if PIECES > 0:
        rows_0 = memory_0 + sample * stride_0
    if PIECES > 1:
        rows_1 = memory_1 + (sample * stride_1 - start_1.to(tl.int64) * WIDTH)
    if PIECES > 2:
        rows_2 = memory_2 + (sample * stride_2 - start_2.to(tl.int64) * WIDTH)
        rows_3 = memory_3 + (sample * stride_3 - start_3.to(tl.int64) * WIDTH)
    if PIECES > 4:
        rows_4 = memory_4 + (sample * stride_4 - start_4.to(tl.int64) * WIDTH)
        rows_5 = memory_5 + (sample * stride_5 - start_5.to(tl.int64) * WIDTH)
        rows_6 = memory_6 + (sample * stride_6 - start_6.to(tl.int64) * WIDTH)
        rows_7 = memory_7 + (sample * stride_7 - start_7.to(tl.int64) * WIDTH)

    most = tl.full([GROUPS, BLOCK_TOKENS], float("-inf"), ACCUMULATION)
    total = tl.zeros([GROUPS, BLOCK_TOKENS], ACCUMULATION)
    attended = tl.zeros([GROUPS, BLOCK_TOKENS, HEAD_CHANNELS], ACCUMULATION)
    any_seen = tl.zeros([GROUPS, BLOCK_KEYS], tl.int32)
    for first in range(0, listed, SPLITS * BLOCK_KEYS):
        entry = first + (group % SPLITS)[:, None] * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)[None, :]  # [g, m]
        seen = entry < listed
        if index is None:
            key = entry
        else:
            key = tl.load(index + sample * index_stride + entry, mask=seen, other=-1)
            seen = (key >= 0) & (key < memory_end + count)
            key = tl.where(seen, key, 0).to(tl.int32)
        any_seen |= seen.to(tl.int32)
        # Pointers are chosen, not values: of each row one address is loaded.
        if PIECES == 0:
            at = own_rows + key.to(tl.int64) * WIDTH
        else:
            at = rows_0
            if PIECES > 1:
                at = tl.where(key >= start_1, rows_1, at)
            if PIECES > 2:
                at = tl.where(key >= start_2, rows_2, at)
                at = tl.where(key >= start_3, rows_3, at)
            if PIECES > 4:
                at = tl.where(key >= start_4, rows_4, at)
                at = tl.where(key >= start_5, rows_5, at)
                at = tl.where(key >= start_6, rows_6, at)
                at = tl.where(key >= start_7, rows_7, at)
            at = tl.where(key >= memory_end, own_rows, at) + key.to(tl.int64) * WIDTH
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
            weights.to(v.dtype), v, attended * shrink[:, :, None], out_dtype=ACCUMULATION, input_precision=PRECISION
        )
        most = more
    if SPLITS > 1:
        most = tl.reshape(most, (BLOCK_HEADS, SPLITS, BLOCK_TOKENS))
        more = tl.max(most, 1)[:, None, :]
        shrink = tl.exp2(most - tl.where(more == float("-inf"), 0.0, more))  # [h, s, t]
        total = tl.sum(tl.reshape(total, (BLOCK_HEADS, SPLITS, BLOCK_TOKENS)) * shrink, 1)
        attended = tl.reshape(attended, (BLOCK_HEADS, SPLITS, BLOCK_TOKENS, HEAD_CHANNELS)) * shrink[:, :, :, None]
        attended = tl.sum(attended, 1)
    none_seen = tl.max(tl.max(any_seen, 1), 0) == 0  # where all scores are -inf, the result is NaN
    attended = attended / tl.where(none_seen, 1.0, total)[:, :, None]

    # From here on one row [C] a token. What a product reads in several blocks goes by way of `out`.
    STORED: tl.constexpr = CHANNELS > BLOCK_INNER
    channel = tl.arange(0, CHANNELS)
    inside = (channel < D)[None, :]
    written = there[:, None]
    to = out + (row * D)[:, None]
    attended = tl.reshape(tl.permute(attended, (1, 0, 2)), (BLOCK_TOKENS, CHANNELS)).to(q.dtype)
    if STORED:
        tl.store(to + channel[None, :], attended, mask=written & inside)
        tl.debug_barrier()
    x = tl.load(
        tokens + sample * batch_stride + token[:, None].to(tl.int64) * token_stride + channel[None, :],
        mask=written & inside, other=0.0,
    ).to(ACCUMULATION)  # fmt: skip
    x += tl.load(out_bias + channel, mask=channel < D, other=0.0).to(ACCUMULATION)[None, :]
    x = _product(x, attended, to, written, out_weight, channel, inside, D, BLOCK_INNER, PRECISION)

    mean, deviation = _statistics(x, inside, eps, D)
    normalised = _normalised(x, mean, deviation, norm_weight, norm_bias, channel, D).to(q.dtype)
    if STORED:
        tl.debug_barrier()
        tl.store(to + channel[None, :], normalised, mask=written & inside)
        tl.debug_barrier()
    x += tl.load(mlp_out_bias + channel, mask=channel < D, other=0.0).to(ACCUMULATION)[None, :]
    for first in range(0, HIDDEN, BLOCK_HIDDEN):
        unit = first + tl.arange(0, BLOCK_HIDDEN)
        exists = (unit < HIDDEN)[None, :]
        hidden = tl.zeros([BLOCK_TOKENS, BLOCK_HIDDEN], ACCUMULATION)
        hidden += tl.load(mlp_in_bias + unit, mask=unit < HIDDEN, other=0.0).to(ACCUMULATION)[None, :]
        hidden = _product(hidden, normalised, to, written, mlp_in_weight, unit, exists, D, BLOCK_INNER, PRECISION)
        hidden = gelu(hidden)
        down = tl.load(
            mlp_out_weight + channel[None, :] * HIDDEN + unit[:, None],
            mask=inside & (unit < HIDDEN)[:, None], other=0.0,
        )  # fmt: skip
        x = tl.dot(hidden.to(q.dtype), down, x, out_dtype=ACCUMULATION, input_precision=PRECISION)
    if STORED:
        tl.debug_barrier()
    tl.store(to + channel[None, :], x.to(q.dtype), mask=written & inside)


_ENOUGH = 132  # programs: as many as an H100 has multiprocessors
_SLOTS = (0, 1, 2, 4, 8)
MOST_PIECES = _SLOTS[-1]


def slots_of(pieces: int) -> int:
    """For how many pieces of memory the kernel is compiled that serves `pieces`."""
    return next(slots for slots in _SLOTS if slots >= pieces)


def _arithmetic(dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    wide = dtype == torch.float64
    return {
        "ACCUMULATION": tl.float64 if wide else tl.float32,
        "PRECISION": "tf32" if tf32 and dtype == torch.float32 else "ieee",
    }


@functools.lru_cache(maxsize=1024)
def project_options(rows: int, dim: int, dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    """Constants of `project_kernel`, and options of its launch, for `rows` tokens of all samples."""
    few = dtype.itemsize > 2 or rows * dim < 64 * 64 * _ENOUGH // 3
    channels = triton.next_power_of_2(dim)
    return {
        "D": dim,
        "CHANNELS": channels,
        "BLOCK_TOKENS": 16 if few else 32 if channels > 128 else 64,
        "BLOCK_OUTPUTS": 32 if few else 64,
        "BLOCK_INNER": min(channels, 128 if dtype.itemsize == 2 else 64 if tf32 else 32),
        **_arithmetic(dtype, tf32),
        "num_warps": 4,
        "num_stages": 2,
    }


@functools.lru_cache(maxsize=1024)
def attend_options(
    samples: int, count: int, dim: int, heads: int, hidden: int, pieces: int, dtype: torch.dtype, tf32: bool
) -> dict[str, Any]:
    """Constants of `attend_kernel`, and options of its launch.

    Without tensor cores (`fma`) a thread holds whole rows of both factors of a product, so the inner blocks are small.
    """
    block_heads, width = triton.next_power_of_2(heads), dim // heads
    channels = block_heads * width
    half, fma = dtype.itemsize == 2, dtype.itemsize > 2 and not tf32
    few = not half or channels > 128 or samples * triton.cdiv(count, 32) < _ENOUGH
    warps = 8 if fma or (few and half) else 4
    block_keys = 32 if channels <= 128 else 16
    room = 16384 // (block_keys * channels * dtype.itemsize)  # bytes of keys in a block
    return {
        "D": dim,
        "HEADS": heads,
        "HEAD_CHANNELS": width,
        "HIDDEN": hidden,
        "PIECES": slots_of(pieces),
        "BLOCK_TOKENS": 16 if few else 32,
        "BLOCK_KEYS": block_keys,
        "BLOCK_HEADS": block_heads,
        "SPLITS": 1 if fma else max(1, min(warps // block_heads, room)),
        "BLOCK_INNER": min(channels, 32 if not half else 128 if channels <= 128 else 64),
        "BLOCK_HIDDEN": min(max(triton.next_power_of_2(hidden), 16), 64 if channels <= 128 else 32),
        **_arithmetic(dtype, tf32),
        "num_warps": max(warps, min(block_heads, 16)),
        "num_stages": 3 if few and half and channels <= 128 else 2,
    }


_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def _compilation(kernel: Any, name: str, dtype: torch.dtype, tf32: bool, integers: Any, options: Any) -> Compilation:
    """integers: the types of arguments that are no pointers; None for one that is None, also for a pointer."""
    names = [n for n in kernel.arg_names if n not in options]
    signature = {n: integers.get(n, f"*{_TYPES[dtype]}") for n in names}
    return Compilation(
        f"transformer_block: {name} {_TYPES[dtype]}{' tf32' if tf32 else ''}",
        kernel,
        {n: kind for n, kind in signature.items() if kind is not None},
        {n: value for n, value in options.items() if n in kernel.arg_names}
        | {n: None for n, kind in signature.items() if kind is None},
        aligned=tuple(n for n in names if n in _ALIGNED and signature[n] is not None),
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        tensor_cores=dtype.itemsize == 2 or tf32,
    )


_ALIGNED = ("batch_stride", "token_stride", *(f"stride_{i}" for i in range(MOST_PIECES)))


def _projection(samples: int, count: int, dim: int, dtype: torch.dtype, tf32: bool = False) -> Compilation:
    integers = dict.fromkeys(("batch_stride", "token_stride", "samples", "count"), "i32") | {
        "eps": "fp32",
        "scale": "fp32",
    }
    options = project_options(samples * count, dim, dtype, tf32)
    name = f"project {options['BLOCK_TOKENS']} tokens, {dim} channels"
    return _compilation(project_kernel, name, dtype, tf32, integers, options)


def _attention(
    samples: int, count: int, pieces: int, dim: int, heads: int, dtype: torch.dtype, tf32: bool = False,
    index: str | None = "*i64",
) -> Compilation:  # fmt: skip
    options = attend_options(samples, count, dim, heads, 2 * dim, pieces, dtype, tf32)
    of_pieces = {
        f"{name}_{i}": kind if i < options["PIECES"] else None
        for i in range(MOST_PIECES)
        for name, kind in (("memory", f"*{_TYPES[dtype]}"), ("stride", "i32"), ("start", "i32"))
    }
    sizes = dict.fromkeys(("batch_stride", "token_stride", "index_stride", "count", "listed", "memory_end"), "i32")
    integers = {**sizes, "eps": "fp32", "index": index, **of_pieces}
    shown = f"attend {options['BLOCK_TOKENS']} tokens, {heads} heads of {dim // heads}, {options['PIECES']} pieces"
    return _compilation(attend_kernel, f"{shown}{', index' if index else ''}", dtype, tf32, integers, options)


_HALF = torch.float16, torch.bfloat16
COMPILATIONS = [
    _projection(1, 68, 128, torch.float32),
    _projection(1, 68, 128, torch.float32, tf32=True),
    *(_projection(samples, 68, 128, dtype) for samples in (1, 64) for dtype in _HALF),
    _projection(64, 68, 256, torch.bfloat16),
    _attention(1, 68, 4, 128, 4, torch.float32),
    _attention(1, 68, 4, 128, 4, torch.float32, tf32=True),
    *(_attention(samples, 68, 4, 128, 4, dtype) for samples in (1, 64) for dtype in _HALF),
    _attention(1, 68, 0, 128, 4, torch.bfloat16, index=None),
    _attention(64, 68, 2, 128, 4, torch.bfloat16, index="*i32"),
    _attention(64, 68, 8, 128, 4, torch.bfloat16),
    _attention(1, 68, 1, 128, 1, torch.bfloat16),
    _attention(64, 68, 1, 64, 4, torch.bfloat16),
    _attention(1, 68, 8, 128, 4, torch.float32),
    _attention(1, 68, 4, 256, 8, torch.float32),
    _attention(1, 68, 4, 256, 4, torch.bfloat16),
    _attention(1, 68, 4, 256, 16, torch.bfloat16),
]
