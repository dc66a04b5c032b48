"""Kernels of qkv_projection: the projection with all before and after it, and gradients around torch's products.

Outputs of the projection come in three sections, of queries, keys and values. A section's output o belongs to channel
o % HEAD_DIM of head o // HEAD_DIM; a block of outputs may span heads, but never sections.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from icseg_kernels.compilation import Compilation

_VARYING = ["samples", "count", "queries", "q_programs"]


@triton.jit
def _rows(pointer, batch_stride, token_stride, sample, token):  # type: ignore[no-untyped-def]
    """Pointers [T, 1] to rows of x or of what is added."""
    return pointer + (sample.to(tl.int64) * batch_stride + token.to(tl.int64) * token_stride)[:, None]


@triton.jit
def _statistics(at, there, eps, C: tl.constexpr, BLOCK_K: tl.constexpr, SUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Means and reciprocal deviations [T] of rows of C values."""
    total = tl.zeros([there.shape[0]], SUM)
    for first in range(0, C, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        mask = there[:, None] & (inner < C)[None, :]
        total += tl.sum(tl.load(at + inner[None, :], mask=mask, other=0.0).to(SUM), 1)
    mean = total / C
    squares = tl.zeros([there.shape[0]], SUM)
    for first in range(0, C, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        mask = there[:, None] & (inner < C)[None, :]
        x = tl.load(at + inner[None, :], mask=mask, other=0.0).to(SUM)
        x = tl.where(mask, x - mean[:, None], 0.0)
        squares += tl.sum(x * x, 1)
    return mean, tl.rsqrt(squares / C + eps)


@triton.jit
def _entering(  # type: ignore[no-untyped-def]
    at, added_at, there, inner, norm_weight, norm_bias, mean, deviation,
    C: tl.constexpr, SUM: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """[T, K] of what is projected: x, normalised and with what is added, where these are; 0 beyond C."""
    exists = inner < C
    mask = there[:, None] & exists[None, :]
    x = tl.load(at + inner[None, :], mask=mask, other=0.0)
    if norm_weight is not None:
        gain = tl.load(norm_weight + inner, mask=exists, other=0.0).to(SUM)
        x = (x.to(SUM) - mean[:, None]) * deviation[:, None] * gain[None, :]
        if norm_bias is not None:
            x += tl.load(norm_bias + inner, mask=exists, other=0.0).to(SUM)[None, :]
    if added_at is not None:
        x = x.to(SUM) + tl.load(added_at + inner[None, :], mask=mask, other=0.0).to(SUM)
    return x.to(FACTOR)


@triton.jit
def _turned(  # type: ignore[no-untyped-def]
    x, cos, sin, batch_stride, head_stride, token_stride, channel_stride, sample, token, block, there,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_O: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Outputs x [T, O] of a block with their pairs of channels turned, or turned back."""
    PAIRS: tl.constexpr = HEAD_DIM // 2
    pair = block * (BLOCK_O // 2) + tl.arange(0, BLOCK_O // 2)
    head, exists = pair // PAIRS, pair < HEADS * PAIRS
    where = (sample.to(tl.int64) * batch_stride + token.to(tl.int64) * token_stride)[:, None]
    where += (head.to(tl.int64) * head_stride + (pair % PAIRS).to(tl.int64) * channel_stride)[None, :]
    mask = there[:, None] & exists[None, :]
    c = tl.load(cos + where, mask=mask, other=0.0).to(x.dtype)
    s = tl.load(sin + where, mask=mask, other=0.0).to(x.dtype)
    if BACK:
        s = -s
    even, odd = tl.split(tl.reshape(x, (x.shape[0], BLOCK_O // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (x.shape[0], BLOCK_O))


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    result, bias, cos, sin, batch_stride, head_stride, token_stride, channel_stride, out,
    sample, token, there, block, count, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Bias and rotation of a block of outputs, written to out [B, HEADS, count, HEAD_DIM]."""
    output = block * BLOCK_O + tl.arange(0, BLOCK_O)
    exists = output < HEADS * HEAD_DIM
    if bias is not None:
        result += tl.load(bias + output, mask=exists, other=0.0).to(result.dtype)[None, :]
    if cos is not None:
        result = _turned(
            result, cos, sin, batch_stride, head_stride, token_stride, channel_stride, sample, token, block, there,
            HEADS, HEAD_DIM, BLOCK_O, False,
        )  # fmt: skip
    head = (output // HEAD_DIM)[None, :]
    to = ((sample.to(tl.int64)[:, None] * HEADS + head) * count + token[:, None]) * HEAD_DIM
    to += (output % HEAD_DIM)[None, :]
    tl.store(out + to, result.to(out.dtype.element_ty), mask=there[:, None] & exists[None, :])


@triton.jit(do_not_specialize=_VARYING)
def project_kernel(  # type: ignore[no-untyped-def]
    x, norm_weight, norm_bias, added, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias,
    q_cos, q_sin, k_cos, k_sin, q, k, v, stats,
    x_b, x_n, added_b, added_n, qc_b, qc_h, qc_n, qc_d, kc_b, kc_h, kc_n, kc_d,
    samples, count, queries, q_programs, eps,
    C: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    SUM: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program for BLOCK_T tokens and BLOCK_O outputs of a section: `q_programs` of queries, then those of all tokens.

    stats [2, B, N]: means and reciprocal deviations, of the programs of the first keys.
    """
    Q_BLOCKS: tl.constexpr = (HEADS * HEAD_DIM + BLOCK_O - 1) // BLOCK_O
    KV_BLOCKS: tl.constexpr = (KV_HEADS * HEAD_DIM + BLOCK_O - 1) // BLOCK_O
    program = tl.program_id(0)
    of_queries = program < q_programs
    block = (program - q_programs) % (2 * KV_BLOCKS)
    of_keys = (program >= q_programs) & (block < KV_BLOCKS)
    weight = tl.where(of_queries, q_weight, tl.where(of_keys, k_weight, v_weight))
    outputs = tl.where(of_queries, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    rows = tl.where(of_queries, queries, count)
    tile = tl.where(of_queries, program // Q_BLOCKS, (program - q_programs) // (2 * KV_BLOCKS))
    block = tl.where(of_queries, program % Q_BLOCKS, tl.where(of_keys, block, block - KV_BLOCKS))

    row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    there = row < samples * rows
    sample, local = row // rows, row % rows
    token = local + (count - rows)
    at = _rows(x, x_b, x_n, sample, token)
    added_at = None
    if added is not None:
        added_at = _rows(added, added_b, added_n, sample, token)
    mean, deviation = None, None
    if norm_weight is not None:
        mean, deviation = _statistics(at, there, eps, C, BLOCK_K, SUM)
        saved = there & (of_keys & (block == 0))
        tl.store(stats + row, mean, mask=saved)
        tl.store(stats + samples * count + row, deviation, mask=saved)

    output = block * BLOCK_O + tl.arange(0, BLOCK_O)
    result = tl.zeros([BLOCK_T, BLOCK_O], SUM)
    for start in range(0, C, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        mask = (output < outputs)[:, None] & (inner < C)[None, :]
        w = tl.load(weight + output.to(tl.int64)[:, None] * C + inner[None, :], mask=mask, other=0.0).to(FACTOR)
        y = _entering(at, added_at, there, inner, norm_weight, norm_bias, mean, deviation, C, SUM, FACTOR)
        result = tl.dot(y, tl.trans(w), result, out_dtype=SUM, input_precision=PRECISION)
    if of_queries:
        _finish(
            result, q_bias, q_cos, q_sin, qc_b, qc_h, qc_n, qc_d, q, sample, local, there, block, rows,
            HEADS, HEAD_DIM, BLOCK_O,
        )  # fmt: skip
    elif of_keys:
        _finish(
            result, k_bias, k_cos, k_sin, kc_b, kc_h, kc_n, kc_d, k, sample, local, there, block, rows,
            KV_HEADS, HEAD_DIM, BLOCK_O,
        )  # fmt: skip
    else:
        _finish(
            result, v_bias, None, None, 0, 0, 0, 0, v, sample, local, there, block, rows, KV_HEADS, HEAD_DIM, BLOCK_O
        )


@triton.jit
def _joined(  # type: ignore[no-untyped-def]
    grad, grad_b, grad_h, grad_n, grad_d, cos, sin, batch_stride, head_stride, token_stride, channel_stride, out,
    sample, token, row, written, block, column, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_O: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Columns of out [B N, WIDTH], from `column` on: the gradient of a section, turned back; 0 of tokens below 0."""
    output = block * BLOCK_O + tl.arange(0, BLOCK_O)
    exists = (output < HEADS * HEAD_DIM)[None, :]
    there = written & (token >= 0)
    where = (sample.to(tl.int64) * grad_b + token.to(tl.int64) * grad_n)[:, None]
    where += ((output // HEAD_DIM).to(tl.int64) * grad_h + (output % HEAD_DIM).to(tl.int64) * grad_d)[None, :]
    found = tl.load(grad + where, mask=there[:, None] & exists, other=0.0).to(SUM)
    if cos is not None:
        found = _turned(
            found, cos, sin, batch_stride, head_stride, token_stride, channel_stride, sample, token, block, there,
            HEADS, HEAD_DIM, BLOCK_O, True,
        )  # fmt: skip
    to = out + row.to(tl.int64)[:, None] * WIDTH + (column + output)[None, :]
    tl.store(to, found.to(out.dtype.element_ty), mask=written[:, None] & exists)


@triton.jit(do_not_specialize=["samples", "count", "queries"])
def adjoint_kernel(  # type: ignore[no-untyped-def]
    grad_q, grad_k, grad_v, q_cos, q_sin, k_cos, k_sin, x, norm_weight, norm_bias, added, stats, joined, entering,
    gq_b, gq_h, gq_n, gq_d, gk_b, gk_h, gk_n, gk_d, gv_b, gv_h, gv_n, gv_d,
    qc_b, qc_h, qc_n, qc_d, kc_b, kc_h, kc_n, kc_d, x_b, x_n, added_b, added_n, samples, count, queries,
    C: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """joined [B N, (HEADS + 2 KV_HEADS) HEAD_DIM]: gradients before the rotation; entering [B N, C]: the projected.

    On a grid of tiles of BLOCK_T tokens times blocks of BLOCK_O columns, of queries, keys, values and `entering`.
    """
    Q_BLOCKS: tl.constexpr = (HEADS * HEAD_DIM + BLOCK_O - 1) // BLOCK_O
    KV_BLOCKS: tl.constexpr = (KV_HEADS * HEAD_DIM + BLOCK_O - 1) // BLOCK_O
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    BLOCKS: tl.constexpr = Q_BLOCKS + 2 * KV_BLOCKS + (0 if entering is None else (C + BLOCK_O - 1) // BLOCK_O)
    row = tl.program_id(0) // BLOCKS * BLOCK_T + tl.arange(0, BLOCK_T)
    block = tl.program_id(0) % BLOCKS
    written = row < samples * count
    sample, token = row // count, row % count
    if block < Q_BLOCKS:
        _joined(
            grad_q, gq_b, gq_h, gq_n, gq_d, q_cos, q_sin, qc_b, qc_h, qc_n, qc_d, joined,
            sample, token - (count - queries), row, written, block, 0, WIDTH, HEADS, HEAD_DIM, BLOCK_O, SUM,
        )  # fmt: skip
    elif block < Q_BLOCKS + KV_BLOCKS:
        _joined(
            grad_k, gk_b, gk_h, gk_n, gk_d, k_cos, k_sin, kc_b, kc_h, kc_n, kc_d, joined,
            sample, token, row, written, block - Q_BLOCKS, HEADS * HEAD_DIM, WIDTH, KV_HEADS, HEAD_DIM, BLOCK_O, SUM,
        )  # fmt: skip
    elif block < Q_BLOCKS + 2 * KV_BLOCKS:
        _joined(
            grad_v, gv_b, gv_h, gv_n, gv_d, None, None, 0, 0, 0, 0, joined,
            sample, token, row, written, block - Q_BLOCKS - KV_BLOCKS, (HEADS + KV_HEADS) * HEAD_DIM, WIDTH,
            KV_HEADS, HEAD_DIM, BLOCK_O, SUM,
        )  # fmt: skip
    elif entering is not None:
        inner = (block - Q_BLOCKS - 2 * KV_BLOCKS) * BLOCK_O + tl.arange(0, BLOCK_O)
        mean, deviation = None, None
        if norm_weight is not None:
            mean = tl.load(stats + row, mask=written, other=0.0)
            deviation = tl.load(stats + samples * count + row, mask=written, other=0.0)
        added_at = None
        if added is not None:
            added_at = _rows(added, added_b, added_n, sample, token)
        y = _entering(
            _rows(x, x_b, x_n, sample, token), added_at, written, inner, norm_weight, norm_bias, mean, deviation,
            C, SUM, entering.dtype.element_ty,
        )  # fmt: skip
        tl.store(
            entering + row.to(tl.int64)[:, None] * C + inner[None, :], y, mask=written[:, None] & (inner < C)[None, :]
        )


@triton.jit
def _normalised(x, x_at, grad, grad_at, norm_weight, inner, there, mean, deviation, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """[T, K] of x normalised, of its norm's gradient, and of that times the weight."""
    mask = there[:, None] & (inner < C)[None, :]
    normed = (tl.load(x_at + inner[None, :], mask=mask, other=0.0).to(mean.dtype) - mean[:, None]) * deviation[:, None]
    g = tl.load(grad_at + inner[None, :], mask=mask, other=0.0).to(mean.dtype)
    gain = tl.load(norm_weight + inner, mask=inner < C, other=0.0).to(mean.dtype)
    return tl.where(mask, normed, 0.0), g, g * gain[None, :]


@triton.jit(do_not_specialize=["samples", "count"])
def norm_kernel(  # type: ignore[no-untyped-def]
    grad, x, norm_weight, stats, grad_x, partial, x_b, x_n, samples, count,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_x [B N, C] of grad [B N, C], and [2, C] of each program: the gradients of weight and bias of its tokens."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = row < samples * count
    mean = tl.load(stats + row, mask=there, other=0.0)
    deviation = tl.load(stats + samples * count + row, mask=there, other=0.0)
    x_at, grad_at = _rows(x, x_b, x_n, row // count, row % count), grad + row.to(tl.int64)[:, None] * C
    level, tilt = tl.zeros([BLOCK_T], mean.dtype), tl.zeros([BLOCK_T], mean.dtype)
    parts = partial + tl.program_id(0).to(tl.int64) * (2 * C)
    for first in range(0, C, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        normed, g, weighted = _normalised(x, x_at, grad, grad_at, norm_weight, inner, there, mean, deviation, C)
        level += tl.sum(weighted, 1)
        tilt += tl.sum(weighted * normed, 1)
        tl.store(parts + inner, tl.sum(g * normed, 0), mask=inner < C)
        tl.store(parts + C + inner, tl.sum(g, 0), mask=inner < C)
    level, tilt = level / C, tilt / C
    for first in range(0, C, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        normed, g, weighted = _normalised(x, x_at, grad, grad_at, norm_weight, inner, there, mean, deviation, C)
        found = deviation[:, None] * (weighted - level[:, None] - normed * tilt[:, None])
        to = grad_x + row.to(tl.int64)[:, None] * C + inner[None, :]
        tl.store(to, found.to(grad_x.dtype.element_ty), mask=there[:, None] & (inner < C)[None, :])


_ENOUGH = 132  # programs: as many as an H100 has multiprocessors


@functools.lru_cache(maxsize=1024)
def project_options(
    rows: int, channels: int, outputs: int, dtype: torch.dtype, tf32: bool, plain: bool
) -> dict[str, Any]:
    """Blocks of `project_kernel`, and options of its launch, for `rows` tokens of all samples, `outputs` of weight.

    plain: x is projected as it is. Otherwise it comes through registers, of which large blocks would need too many.
    """
    half = dtype.itemsize == 2
    few = triton.cdiv(rows, 64) * triton.cdiv(outputs, 64) < _ENOUGH
    many = triton.cdiv(rows, 128) * triton.cdiv(outputs, 128) >= 2 * _ENOUGH
    inner = max(16, triton.next_power_of_2(channels))
    if half:
        tokens, block, warps = (128, 128 if plain else 64, 8) if many else (16, 32, 4) if few else (64, 64, 4)
    elif tf32:
        tokens, block, warps = (16, 32, 4) if few else (64, 64, 4)
    else:
        tokens, block, warps = (16, 32, 4) if few else (32, 64, 8)
    return {
        "BLOCK_T": tokens,
        "BLOCK_O": block,
        "BLOCK_K": min(inner, 64 if half and plain else 32),
        "num_warps": warps,
        "num_stages": 3 if half else 2,
    }


ADJOINT = {"BLOCK_T": 16, "BLOCK_O": 128, "num_warps": 4}


def norm_options(rows: int, channels: int) -> dict[str, Any]:
    """Few tokens a program where there are few, so that there are enough programs; else fewer sums to add up."""
    tokens = 16 if rows < 64 * _ENOUGH else 64
    return {"BLOCK_T": tokens, "BLOCK_K": min(max(16, triton.next_power_of_2(channels)), 64), "num_warps": 4}


_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def _compilation(
    kernel: Any, shown: str, dtype: torch.dtype, options: dict[str, Any], without: tuple[str, ...] = (),
    wide: tuple[str, ...] = (), tf32: bool = False, **constants: Any,
) -> Compilation:  # fmt: skip
    """Of contiguous heads and rows; without: tensors that are None; wide: tensors in float32 whatever the dtype."""
    constants = {n: value for n, value in (constants | options).items() if n in kernel.arg_names}
    constants |= {n: 1 for n in kernel.arg_names if n.endswith("_d")}
    constants |= {n: None for n in without if n in kernel.arg_names}
    signature, aligned = {}, []
    for n in kernel.arg_names:
        if n in constants:
            continue
        if n == "eps":
            signature[n] = "fp32"
        elif n in _VARYING or n[-2:] in ("_b", "_h", "_n"):
            signature[n] = "i32"
            aligned += [] if n in _VARYING else [n]
        else:
            signature[n] = "*fp32" if n in _OF_SUMS + wide else _POINTERS[dtype]
    name = f"{kernel.__name__.removesuffix('_kernel')} {_POINTERS[dtype][1:]}{' tf32' if tf32 else ''} {shown}"
    return Compilation(
        f"qkv_projection: {name}",
        kernel,
        signature,
        constants,
        aligned=tuple(aligned),
        num_warps=options["num_warps"],
        num_stages=options.get("num_stages", 3),
        tensor_cores=kernel is project_kernel and (dtype.itemsize == 2 or tf32),
    )


_OF_SUMS = ("stats", "q_cos", "q_sin", "k_cos", "k_sin", "partial")
_ANGLES = ("q_cos", "q_sin", "k_cos", "k_sin")
_BIASES = ("q_bias", "k_bias", "v_bias")
_BEFORE = ("norm_weight", "norm_bias", "added", "stats")
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _projection(
    rows: int, channels: int, heads: int, dtype: torch.dtype, *, tf32: bool = False, plain: bool = False,
    rotary: bool = True, autocast: bool = False, kv_heads: int | None = None,
) -> Compilation:  # fmt: skip
    """plain: without norm and what is added; autocast: x and these in float32; kv_heads: and without bias."""
    options = project_options(rows, channels, 3 * channels, dtype, tf32, plain)
    shown = f"{options['BLOCK_T']} tokens, {heads} heads of {channels // heads}"
    shown += f"{', plain' if plain else ''}{', rotary' if rotary else ''}{', autocast' if autocast else ''}"
    shown += f", {kv_heads} of keys" if kv_heads else ""
    without = (_BEFORE if plain else ()) + (() if rotary else _ANGLES) + (_BIASES if kv_heads else ())
    return _compilation(
        project_kernel, shown, dtype, options, without,
        ("x", "norm_weight", "norm_bias", "added") if autocast else (), tf32, C=channels, HEADS=heads,
        KV_HEADS=kv_heads or heads, HEAD_DIM=channels // heads, SUM=tl.float32, FACTOR=_TYPES[dtype],
        PRECISION="tf32" if tf32 else "ieee",
    )  # fmt: skip


def _gradients(channels: int, heads: int, dtype: torch.dtype) -> Iterator[Compilation]:
    shown = f"{heads} heads of {channels // heads}"
    sizes: dict[str, Any] = {"C": channels, "HEADS": heads, "KV_HEADS": heads, "HEAD_DIM": channels // heads}
    yield _compilation(adjoint_kernel, shown, dtype, ADJOINT, SUM=tl.float32, **sizes)
    yield _compilation(
        adjoint_kernel, f"{shown}, plain", dtype, ADJOINT, (*_BEFORE, "entering"), SUM=tl.float32, **sizes
    )
    for rows in (1000, 100_000):
        options = norm_options(rows, channels)
        yield _compilation(norm_kernel, f"{channels} channels {options['BLOCK_T']} tokens", dtype, options, **sizes)


_FEW, _SOME, _MANY = 64, 4096, 65536  # tokens
_HALF = torch.float16, torch.bfloat16
COMPILATIONS = [
    *(_projection(rows, 256, 4, dtype) for rows in (_FEW, _SOME, _MANY) for dtype in _HALF),
    *(_projection(rows, 256, 4, torch.float32, tf32=tf32) for rows in (_FEW, _MANY) for tf32 in (False, True)),
    *(_projection(rows, 256, 4, torch.bfloat16, plain=True) for rows in (_FEW, _SOME, _MANY)),
    _projection(_MANY, 256, 4, torch.float32, plain=True),
    _projection(_MANY, 256, 4, torch.float32, tf32=True, plain=True),
    _projection(_SOME, 256, 4, torch.bfloat16, plain=True, rotary=False),
    *(_projection(rows, 256, 4, torch.bfloat16, autocast=True) for rows in (_FEW, _SOME, _MANY)),
    _projection(_MANY, 1024, 16, torch.bfloat16),
    _projection(_SOME, 96, 3, torch.bfloat16),
    _projection(_MANY, 1024, 16, torch.bfloat16, plain=True, kv_heads=4),
    *(compilation for dtype in _POINTERS for compilation in _gradients(256, 4, dtype)),
]
